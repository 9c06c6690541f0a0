"""The calls of QEfficient, with only the import line changed."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM, cloud_ai_100_exec_kv
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import ArtifactError, UnsupportedModelError, UsageError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from tests.conftest import small_model

pytestmark = pytest.mark.one_home


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

    def test_an_argument_that_is_misspelled_names_the_nearest(self, demo_checkpoint: Path) -> None:
        with pytest.raises(UsageError, match=r"'num_hidden_layer'\. Try 'num_hidden_layers'"):
            QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, num_hidden_layer=2)
        model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
        with pytest.raises(UsageError, match="Try 'mxfp6_matmul'"):
            model.compile(mxfp6=True)
        with pytest.raises(UsageError, match="Try 'generation_len'"):
            model.generate("Anna", generation_length=2)

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

    def test_inputs_may_be_given_by_name(self, make_model: Any) -> None:
        model = QEFFAutoModelForCausalLM(make_model("gpt2"))
        batch = {
            "input_ids": torch.tensor([[0, 3, 4]]),
            "attention_mask": torch.tensor([[0, 1, 1]]),
        }
        expected = model.generate(inputs=batch, generation_len=5).generated_ids
        assert np.array_equal(model.generate(**batch, max_new_tokens=5).generated_ids, expected)
        padded = {name: torch.nn.functional.pad(each, (0, 4)) for name, each in batch.items()}
        assert np.array_equal(
            model.generate(inputs=padded, generation_len=5).generated_ids, expected
        )
        unmasked = model.generate(input_ids=[[0, 3, 4]], max_new_tokens=5).generated_ids
        assert not np.array_equal(unmasked, expected)
        with pytest.raises(UsageError, match=r"has no argument 'prompt'\. Try 'prompts'"):
            model.generate(prompt=["a"])

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_model_changed_in_memory_is_another_export(
        self, in_memory: bool, make_model: Any, tmp_path: Path
    ) -> None:
        """It is neither exported as it was nor taken for what its files hold."""
        make_model("gpt2").save_pretrained(tmp_path / "gpt2")

        def load() -> Any:
            source = str(tmp_path / "gpt2")
            if in_memory:
                return QEFFAutoModelForCausalLM(AutoModelForCausalLM.from_pretrained(source))
            return QEFFAutoModelForCausalLM.from_pretrained(source)

        first, changed, again = load(), load(), load()
        first.export()
        with torch.no_grad():
            changed.model.transformer.h[1].mlp.c_proj.weight.mul_(-3)
            ids = changed.model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        made = [tokens(each) for each in (first, changed, again)]
        assert made[1] == ids[:, IDS.shape[1] :].tolist() != made[0]
        assert made[2] == made[0]
        assert again.onnx_path == first.onnx_path != changed.onnx_path

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


@pytest.fixture(scope="module")
def ready(demo_checkpoint: Path, demo_export: Path, tmp_path_factory: Any) -> Any:
    """A compiled model, on a copy of the export that tests share."""
    folder = tmp_path_factory.mktemp("ready") / "export"
    shutil.copytree(demo_export, folder, ignore=shutil.ignore_patterns("io", "compiled"))
    model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, enable_proxy=True)
    assert (model.onnx_path, model.qpc_path) == (None, None)
    assert model.compile(folder / "body.onnx", prefill_seq_len=8, ctx_len=64) == model.qpc_path
    return model


TEXT = "Anna went to the"


class TestGenerate:
    """Arguments of ``generate``, and ``cloud_ai_100_exec_kv``."""

    def test_paths_and_config_are_attributes(self, ready: Any) -> None:
        assert ready.onnx_path.name == "body.onnx"
        assert ready.qpc_path.parents[1] == ready.onnx_path.parent
        assert ready.config.vocab_size == ready.model.config.vocab_size

    def test_tokenizer_and_prompts_in_any_order(self, ready: Any, tokenizer: Any) -> None:
        result = ready.generate(tokenizer, [TEXT], generation_len=4)
        assert result["generated_texts"] == result.generated_texts
        for again in (
            ready.generate(TEXT, tokenizer, generation_len=4),
            ready.generate(tokenizer, prompts=TEXT, generation_len=4),
        ):
            assert again.generated_texts == result.generated_texts
        with pytest.raises(UsageError, match="two prompts arguments"):
            ready.generate(TEXT, prompts=TEXT)

    def test_prompts_of_a_file(self, ready: Any, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text(f"{TEXT}\n\nLeo\n")
        path = tmp_path / "prompts.txt"
        both = ready.generate(prompts_txt_file_path=path, generation_len=3)
        assert both.generated_texts == ready.generate([TEXT, "Leo"], generation_len=3)[TEXTS]
        with pytest.raises(UsageError, match=r"none.txt' cannot be read"):
            ready.generate(prompts_txt_file_path=str(tmp_path / "none.txt"))

    def test_stream_prints_as_often_as_it_runs(self, ready: Any, capsys: Any) -> None:
        result = ready.generate(TEXT, generation_len=4, stream=True, iteration=2)
        said = capsys.readouterr().out
        assert said.count(result.generated_texts[0].strip()) == 2
        with pytest.raises(UsageError, match="one prompt"):
            ready.generate([TEXT, TEXT], stream=True)

    def test_runtime_ai100_chooses_torch(self, ready: Any) -> None:
        ids = ready.generate(TEXT, generation_len=4).generated_ids
        compiled = ready.onnx_path.parent / "compiled"
        assert not list(compiled.glob("torch-*"))
        result = ready.generate(TEXT, generation_len=4, runtime_ai100=False)
        assert np.array_equal(result.generated_ids, ids)
        assert len(list(compiled.glob("torch-*"))) == 1
        assert ready.qpc_path.name.startswith("onnxruntime-")

    def test_what_was_compiled_runs_by_its_folder(
        self, ready: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        ids = ready.generate(TEXT, generation_len=4).generated_ids
        result = cloud_ai_100_exec_kv(
            tokenizer, ready.qpc_path, TEXT, generation_len=4, write_io_dir=tmp_path / "io"
        )
        assert np.array_equal(result.generated_ids, ids)
        assert "lm_head.out.logits" in read_dump(tmp_path / "io").names()
        with pytest.raises(ArtifactError, match="nothing that was compiled"):
            cloud_ai_100_exec_kv(tokenizer, tmp_path, TEXT)

    def test_an_adapter_is_not_left_out_silently(self, ready: Any) -> None:
        with pytest.raises(UsageError, match="answer of the base model"):
            ready.generate(TEXT, prompt_to_lora_id_mapping=[1])


TEXTS = "generated_texts"
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: Any) -> Path:
    """A checkpoint of six layers, in bfloat16."""
    folder = tmp_path_factory.mktemp("deep") / "llama"
    small_model("llama", layers=6).to(torch.bfloat16).save_pretrained(folder)
    return folder


def tokens(model: Any) -> list[list[int]]:
    made = model.generate(inputs={"input_ids": IDS}, generation_len=6, do_sample=False)
    return made.generated_ids.tolist()  # type: ignore[no-any-return]


def tokens_of_transformers(folder: Path, config: Any) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    made = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    return made[:, IDS.shape[1] :].tolist()  # type: ignore[no-any-return]


class TestFromPretrained:
    """Arguments of ``from_pretrained`` that say what is loaded."""

    def test_the_depth_of_a_config(self, deep: Path) -> None:
        config = AutoConfig.from_pretrained(deep)
        config.num_hidden_layers = 3
        model = QEFFAutoModelForCausalLM.from_pretrained(deep, config=config, enable_proxy=True)
        assert model.config.num_hidden_layers == 3
        assert tokens(model) == tokens_of_transformers(deep, config)
        same = QEFFAutoModelForCausalLM.from_pretrained(deep, num_hidden_layers=3, proxy="split")
        assert same.export() == model.export()

    def test_other_values_of_a_config(self, deep: Path) -> None:
        config = AutoConfig.from_pretrained(deep)
        config.rms_norm_eps, config.num_hidden_layers = 0.5, 2
        model = QEFFAutoModelForCausalLM.from_pretrained(deep, config=config, enable_proxy=True)
        assert tokens(model) == tokens_of_transformers(deep, config)
        assert model.config.rms_norm_eps == 0.5
        folder = model._loaded.folder
        assert folder.is_dir()
        del model
        gc.collect()
        assert not folder.exists()

    def test_a_config_of_the_checkpoint_changes_nothing(self, deep: Path) -> None:
        config = AutoConfig.from_pretrained(deep)
        model = QEFFAutoModelForCausalLM.from_pretrained(deep, config=config)
        plain = QEFFAutoModelForCausalLM.from_pretrained(deep)
        assert model._loaded.identity == plain._loaded.identity
        with pytest.raises(UsageError, match="of model type 'gpt2'"):
            QEFFAutoModelForCausalLM.from_pretrained(deep, config=GPT2Config())

    def test_dtypes(self, deep: Path) -> None:
        def dtype(**arguments: Any) -> str:
            return QEFFAutoModelForCausalLM.from_pretrained(deep, **arguments)._loaded.dtype

        config = AutoConfig.from_pretrained(deep)
        assert dtype(config=config) == "float32"
        config.dtype = torch.float16
        assert dtype(config=config) == "float16"
        assert dtype(config=config, dtype="float32") == "float32"
        assert dtype(torch_dtype=torch.float16) == "float16"
        assert dtype(torch_dtype="auto") == "bfloat16"
        with pytest.raises(UsageError, match="say the same"):
            dtype(dtype="float32", torch_dtype="float16")

    def test_the_hub_gets_its_arguments(self, deep: Path, monkeypatch: Any) -> None:
        asked: dict[str, Any] = {}

        def snapshot_download(source: str, **arguments: Any) -> str:
            asked.update(source=source, **arguments)
            return str(deep)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        hub = {"revision": "v2", "cache_dir": "there", "token": "hf_no_token"}
        model = QEFFAutoModelForCausalLM.from_pretrained("owner/name", **hub)
        assert {name: asked[name] for name in hub} == hub
        assert asked["source"] == model._loaded.source == "owner/name"
        with pytest.warns(UserWarning, match="revision is ignored: .* is a local folder"):
            QEFFAutoModelForCausalLM.from_pretrained(deep, revision="v2")

    def test_a_class_called_on_a_model(self, make_model: Any) -> None:
        model = QEFFAutoModelForCausalLM(
            make_model("gpt2"), enable_proxy=True, continuous_batching=False
        )
        assert len(read_parts(model)) == 3
        with pytest.warns(UserWarning, match="num_hidden_layers is ignored: the model is loaded"):
            QEFFAutoModelForCausalLM(make_model("gpt2"), num_hidden_layers=1)
        with pytest.raises(UsageError, match="no option 'pooling'"):
            QEFFAutoModelForCausalLM(make_model("gpt2"), pooling="mean")


def read_parts(model: Any) -> Any:
    return read_export(model.export()).parts
