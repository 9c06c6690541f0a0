"""The calls of QEfficient, with only the import line changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.cli import main
from qeff_proxy.errors import UnsupportedModelError, UsageError


class TestFace:
    """The calls of QEfficient, with only the import line changed."""

    def test_the_reference_script_works(
        self, demo_checkpoint: Path, tokenizer: Any, eager: Any
    ) -> None:
        model = QEFFAutoModelForCausalLM.from_pretrained(str(demo_checkpoint), enable_proxy=True)
        model.export()
        with pytest.warns(UserWarning, match="mxfp6_matmul means nothing to backend 'onnxruntime'"):
            model.compile(
                prefill_seq_len=8, ctx_len=128, num_cores=16, mxfp6_matmul=True, num_devices=1
            )
        result = model.generate(
            prompts=["Hi there!! My name is"], tokenizer=tokenizer, write_io=True, generation_len=12
        )
        batch = tokenizer(["Hi there!! My name is"], return_tensors="pt")
        with torch.no_grad():
            ids = eager.generate(**batch, max_new_tokens=12, do_sample=False)
        expected = ids[:, batch["input_ids"].shape[1] :].numpy()
        assert np.array_equal(result.generated_ids, expected)
        assert result.generated_texts == tokenizer.batch_decode(expected)
        assert result.batch_size == 1
        assert result.io_folder is not None
        assert (result.io_folder / "manifest.json").is_file()

    @pytest.mark.parametrize("options", [{"mos": 1}, {"full_batch_size": 1}])
    def test_an_option_that_means_nothing_here_is_named(
        self, demo_checkpoint: Path, options: dict[str, int]
    ) -> None:
        model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
        with pytest.warns(UserWarning, match=f"{min(options)} means nothing to backend"):
            model.compile(**options)  # type: ignore[arg-type]

    def test_options_of_qefficient_for_elsewhere_say_where(self, demo_checkpoint: Path) -> None:
        with pytest.raises(UsageError, match=r"num_hidden_layers.*export\(num_layers=…\)"):
            QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, num_hidden_layers=2)
        model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
        ids = {"input_ids": [[5, 6, 7]]}
        with pytest.warns(UserWarning, match="device_ids is for QEfficient's hardware"):
            result = model.generate(inputs=ids, generation_len=2, device_ids=[0, 1])
        assert result.generated_ids.shape == (1, 2)

    def test_the_command_line_finds_the_export_that_python_made(
        self, demo_checkpoint: Path, monkeypatch: Any, tmp_path: Path, capsys: Any
    ) -> None:
        monkeypatch.setenv("QEFF_HOME", str(tmp_path))
        model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
        folder = model.export()
        assert main(["export", str(demo_checkpoint), "--json"]) == 0
        assert str(folder) in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]

    def test_a_stub_refuses_to_generate(self, make_model: Any) -> None:
        model = QEFFAutoModelForCausalLM(make_model("gpt2"), proxy="stub")
        with pytest.raises(UsageError, match="stub's outputs mean nothing"):
            model.generate(inputs={"input_ids": [[3, 4]]})

    def test_without_proxy_the_whole_model_runs(self, make_model: Any) -> None:
        source = make_model("gpt2")
        model = QEFFAutoModelForCausalLM(source)
        result = model.generate(inputs={"input_ids": [[3, 4]]}, generation_len=5, do_sample=False)
        with torch.no_grad():
            expected = source.generate(
                torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False, pad_token_id=0
            )
        assert np.array_equal(result.generated_ids, expected[:, 2:].numpy())
        assert [part.name for part in read_parts(model)] == ["model"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give either prompts or inputs"),
            ({"prompts": []}, "give either prompts or inputs"),
            ({"prompts": ["a"], "inputs": {"input_ids": [[1]]}}, "give either"),
            ({"prompts": ["a"], "generation_len": 3, "max_new_tokens": 4}, "say the same"),
        ],
    )
    def test_contradictions_are_refused(
        self, arguments: Any, message: str, demo_checkpoint: Path
    ) -> None:
        model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
        with pytest.raises(UsageError, match=message):
            model.generate(**arguments)

    def test_a_model_of_another_task_is_refused(self, tmp_path: Path) -> None:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        ViTModel(config).save_pretrained(tmp_path / "vit")
        model = QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "vit", enable_proxy=True)
        with pytest.raises(UnsupportedModelError, match="'vit' model, which AutoModelForCausalLM"):
            model.export()


def read_parts(model: Any) -> Any:
    return read_export(model.export()).parts
