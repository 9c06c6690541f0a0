"""``verify --by-layer`` of recognizers: a fault in the export shows in its own layer alone."""

from __future__ import annotations

import copy

import onnx_ir as ir
import pytest
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.verify.by_layer.verify_layers import verify_layers_of
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home


@pytest.mark.parametrize(
    ("name", "part", "weight"),
    [
        ("wav2vec2", "body", "encoder.layers.{}.feed_forward.intermediate_dense.weight"),
        ("whisper", "encoder", "encoder.layers.{}.fc1.weight"),
        ("whisper", "body", "decoder.layers.{}.fc1.weight"),
    ],
)
def test_a_fault_is_local_in_its_own_layer_alone(name, part, weight, ctc_model, whisper, tmp_path):
    model = copy.deepcopy(whisper) if name == "whisper" else ctc_model(name, num_hidden_layers=3)
    loaded = wrap_model(model)
    hooks = Plugins.discover().hooks_for(name)
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    options = VerifyOptions(max_new_tokens=3)

    def verified():
        found = verify_layers_of(export, loaded, ["onnxruntime"], (None, None), options, hooks)
        (result,) = found.results
        assert result.error is None
        return result

    assert verified().passed
    path = export.folder / export.part(part).file
    graph = ir.load(path)
    weights = graph.graph.initializers
    (faulty,) = (key for key in weights if key.endswith(weight.format(1)))
    before = faulty.replace(weight.format(1), weight.format(0))
    weights[faulty].const_value = weights[before].const_value
    ir.save(graph, path)
    result = verified()
    assert [layer.name for layer in result.faulty] == [f"{part} layer 1"]
    names = [layer.name for layer in result.layers]
    inherits = [layer.name for layer in result.layers if not layer.inherited.passed]
    after = names[names.index(f"{part} layer 1") :]
    assert inherits == [one for one in after if name != "whisper" or one != "embedding"]
