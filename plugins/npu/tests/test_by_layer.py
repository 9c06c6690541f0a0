"""``verify --by-layer`` on OpenVINO and in HTP's emulator: a fault shows in its own layer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qeff_proxy.errors import UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.isolate import isolate_fault
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.by_layer.verify_layers import verify_layers, verify_layers_of
from qeff_proxy.verify.options import VerifyOptions
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.one_home

IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 17, 18, 19]])
TENSORS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
REQUEST = Request(inputs={name: tensor.numpy() for name, tensor in TENSORS.items()})
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 131}


@pytest.mark.parametrize(("backend", "decibels"), [("openvino", 115), ("qnn", 45)])
def test_a_fault_is_local_in_its_own_layer_alone(
    backend: str, decibels: int, tmp_path: Path
) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=4, max_position_embeddings=64)
    loaded = wrap_model(random_weights(LlamaForCausalLM(config), 0))
    hooks = Plugins.discover().hooks_for("llama")
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    path = export.folder / export.part("body").file
    model = ir.load(path)
    weights = model.graph.initializers
    (name,) = (name for name in weights if name.endswith(".2.mlp.up_proj.weight"))
    weights[name].const_value = weights[name.replace(".2.", ".1.")].const_value
    ir.save(model, path)
    options = VerifyOptions(max_new_tokens=2)
    found = verify_layers_of(export, loaded, [backend], (REQUEST, TENSORS), options, hooks)
    (result,) = found.results
    assert result.error is None
    assert [layer.name for layer in result.faulty] == ["body layer 2"]
    inherits = [layer.name for layer in result.layers if not layer.inherited.passed]
    assert inherits == ["body layer 2", "body layer 3", "body", "lm_head"]
    healthy = [layer.local for layer in result.layers if layer.passed]
    assert all(error.sqnr > decibels for error in healthy)
    assert any(np.isfinite(error.sqnr) for error in healthy)


def test_a_weight_five_percent_too_large_shows_in_half_precision(tmp_path: Path) -> None:
    """Its error is within 40 dB, the fixed limit; the layers like it are within 6 dB of another."""
    config = BertConfig(**SIZES, num_hidden_layers=5, max_position_embeddings=64)
    loaded = wrap_model(random_weights(BertModel(config), 0))
    hooks = Plugins.discover().hooks_for("bert")
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    arguments = ["qnn"], (REQUEST, TENSORS), VerifyOptions(), hooks
    path = export.folder / export.part("body").file
    model = ir.load(path)
    weights = model.graph.initializers
    (name,) = (name for name in weights if name.endswith(".2.attention.output.dense.weight"))
    values = weights[name].const_value.numpy()
    weights[name].const_value = ir.tensor(values * np.float32(1.05), name=name)
    ir.save(model, path)
    (faulty,) = verify_layers_of(export, loaded, *arguments).results
    assert faulty.error is None
    assert [layer.name for layer in faulty.faulty] == ["body layer 2"]
    (local,) = (layer.local for layer in faulty.faulty)
    assert local.nearest is not None
    assert local.nearest.sqnr < local.nearest.limit < local.nearest.floor


@pytest.mark.parametrize(
    "look", [isolate_fault, lambda model, name, *rest: verify_layers(model, [name], *rest)]
)
def test_a_precision_that_is_calibrated_is_refused_before_the_export(
    look: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    loaded = wrap_model(
        random_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=5)), 0)
    )
    options = VerifyOptions(backends={"qnn": {"precision": "a8w8"}})
    with pytest.raises(UsageError, match="qnn in a8w8 is calibrated on inputs of the whole model"):
        look(loaded, "qnn", REQUEST, options)
    assert list(tmp_path.iterdir()) == []
