"""The Python classes export as the command does: of a checkpoint only the first layers are read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy import QEFFAutoModel, QEFFAutoModelForCausalLM
from qeff_proxy.load import first_layers
from qeff_proxy.load.transformers_model import NotSampled


def weights_of(model: Any, folder: Path) -> str:
    model.export(folder)
    manifest = json.loads((folder / "export.json").read_text())
    return str(manifest["cut"]["weights"])


def test_a_deep_checkpoint_is_streamed(make_model: Any, tmp_path: Path) -> None:
    make_model("llama", layers=5).save_pretrained(tmp_path / "llama")
    model = QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "llama", enable_proxy=True)
    assert weights_of(model, tmp_path / "export").startswith("streamed from the checkpoint; BLAKE3")


def test_layers_with_a_layer_id_are_streamed_and_give_the_tokens_of_transformers(
    make_model: Any, tmp_path: Path
) -> None:
    settings = {"attention_types": [[["global", "local"], 3]], "window_size": 6}
    source = make_model("gpt_neo", layers=6, **settings)
    source.save_pretrained(tmp_path / "neo")
    model = QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "neo", proxy="split")
    weights_of(model, tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / "export.json").read_text())
    assert manifest["cut"]["layers"]["verified"] == 2
    ids = torch.arange(3, 23)[None]
    expected = source.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    result = model.generate(inputs={"input_ids": ids}, max_new_tokens=12, do_sample=False)
    assert result.generated_ids.tolist() == expected[:, 20:].tolist()


def test_a_deep_encoder_is_streamed(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    model = QEFFAutoModel.from_pretrained(tmp_path / "bert", pooling="mean")
    assert weights_of(model, tmp_path / "export").startswith("streamed from the checkpoint; BLAKE3")


def test_a_large_checkpoint_that_is_not_streamed_is_named_with_the_reason(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_sampled(*_: Any) -> None:
        raise NotSampled("its layers calculate with their index")

    make_model("llama", layers=5).save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(first_layers, "sample_model", not_sampled)
    model = QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "llama", enable_proxy=True)
    # The attribute of the package is the function.
    module = importlib.import_module("qeff_proxy.export.export_model")
    monkeypatch.setattr(module, "_LARGE", 1000)
    with pytest.warns(UserWarning, match=r"is loaded whole \(0\.\d GB\), .* their index"):
        assert weights_of(model, tmp_path / "export").startswith("loaded whole")
