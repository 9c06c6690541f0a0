"""``verify --by-layer`` of an image-text model: a fault shows in its own layer alone."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.by_layer.verify_layers import verify_layers_of
from qeff_proxy.verify.options import VerifyOptions
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

pytestmark = pytest.mark.one_home

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
FAULTS = {"vision": (2, "mlp.fc1.weight"), "body": (3, "mlp.up_proj.weight")}


@pytest.fixture(scope="module")
def llava():
    """Five layers in the tower, of which the features are those of the last but one; six above."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, num_hidden_layers=5, image_size=24, patch_size=8),
        text_config=LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=131),
        image_token_index=130,
        image_seq_length=9,
    )
    return random_weights(LlavaForConditionalGeneration(config).eval(), 0)


@pytest.mark.parametrize(("backend", "decibels"), [("onnxruntime", 100), ("openvino", 100)])
def test_a_fault_is_local_in_its_own_layer_alone(backend, decibels, llava, tmp_path):
    loaded = wrap_model(llava)
    hooks = Plugins.discover().hooks_for("llava")
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    for part, (layer, weight) in FAULTS.items():
        path = export.folder / export.part(part).file
        graph = ir.load(path)
        weights = graph.graph.initializers
        (faulty,) = (name for name in weights if name.endswith(f".{layer}.{weight}"))
        other = faulty.replace(f".{layer}.{weight}", f".{layer - 1}.{weight}")
        weights[faulty].const_value = weights[other].const_value
        ir.save(graph, path)
    options = VerifyOptions(max_new_tokens=3)
    (result,) = verify_layers_of(export, loaded, [backend], (None, None), options, hooks).results
    assert result.error is None
    assert [one.name for one in result.faulty] == ["vision layer 2", "body layer 3"]
    names = [one.name for one in result.layers]
    inherits = [one.name for one in result.layers if not one.inherited.passed]
    assert inherits[0] == "vision layer 2"
    assert set(names[names.index("body layer 0") :]) <= set(inherits)
    healthy = [one.local.sqnr for one in result.layers if one.local.passed]
    assert min(healthy) > decibels
