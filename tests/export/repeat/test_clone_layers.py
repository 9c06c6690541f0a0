"""Layers that are alike are traced once; others, and faults, are noticed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qeff_proxy.errors import ExportError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.plugins.manager import Plugins


def export(model: Any, folder: Path, stages: list[str] | None = None) -> Any:
    hooks = Plugins.discover().hooks_for(model.config.model_type)
    progress = stages.append if stages is not None else lambda _stage: None
    return export_model(wrap_model(model), hooks, output=folder, progress=progress)


def test_every_layer_has_its_own_weights_cache_and_names(make_model: Any, tmp_path: Path) -> None:
    found = export(make_model("gpt2", layers=6), tmp_path / "out")
    assert found.cut["traced_layers"] == {"body": 1}
    stored = read_header(found.folder / "body.safetensors")
    for layer in range(6):
        assert sum(name.startswith(f"transformer.h.{layer}.") for name in stored) == 12
    graph = onnx.load(found.folder / "body.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == [
        "last_hidden_state",
        *(f"present.{layer}.{side}" for layer in range(6) for side in ("key", "value")),
    ]
    names = [output for node in graph.node for output in node.output]
    assert len(set(names)) == len(names)
    scopes = [
        prop.value
        for node in graph.node
        for prop in node.metadata_props
        if prop.key == "pkg.torch.onnx.name_scopes"
    ]
    for layer in range(6):
        assert any(f"'decoder.h.{layer}.attn'" in scope for scope in scopes)


def test_the_graph_is_the_same_each_time(make_model: Any, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        found = export(make_model("gemma2", layers=4), tmp_path / name)
        files.append([(part.file, part.sha256) for part in found.parts])
    assert files[0] == files[1]


def test_a_layer_that_depends_on_its_index_is_not_repeated(make_model: Any, tmp_path: Path) -> None:
    """Each layer scales by its own index, so that each is a kind of its own."""
    model = make_model("gpt2", layers=4, scale_attn_by_inverse_layer_idx=True)
    found = export(model, tmp_path / "out")
    assert found.cut["traced_layers"] == {}
    assert found.cut["graphs"]["body"] < 1e-5


def test_layers_of_different_width_are_kinds_of_their_own(make_model: Any, tmp_path: Path) -> None:
    import torch

    model = make_model("llama", layers=4)
    for layer in (1, 3):
        mlp = model.model.layers[layer].mlp
        for name, shape in (
            ("gate_proj", (40, 64)),
            ("up_proj", (40, 64)),
            ("down_proj", (64, 40)),
        ):
            getattr(mlp, name).weight = torch.nn.Parameter(torch.randn(shape) * 0.1)
    found = export(model, tmp_path / "out")
    assert found.cut["traced_layers"] == {"body": 2}
    assert found.cut["graphs"]["body"] < 1e-5


def test_a_wrong_clone_is_found(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers' weights exchanged while cloning: nothing else than the numbers tells."""
    from qeff_proxy.export.repeat import clone_layers as layer_graphs

    model = make_model("llama", layers=4)
    tensors = dict(model.named_parameters())
    original = layer_graphs._weights

    def exchanged(call: Any, name_of: Any) -> Any:
        places = {".1.": ".2.", ".2.": ".1."}
        for path, name, tensor in original(call, name_of):
            other = re.sub(r"\.[12]\.", lambda match: places[match.group()], name)
            yield path, other, tensors.get(other, tensor)

    monkeypatch.setattr(layer_graphs, "_weights", exchanged)
    stages: list[str] = []
    found = export(model, tmp_path / "out", stages)
    assert "the repeated layers differ: tracing all of them" in stages
    assert found.cut["graphs"]["body"] < 1e-5


def test_a_graph_that_differs_without_repetition_is_refused(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qeff_proxy.export import check_graph

    monkeypatch.setitem(check_graph._TOLERANCES, "float32", -1.0)
    with pytest.raises(ExportError, match="differs by"):
        export(make_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_depth_changes_nothing_but_the_depth(make_model: Any, tmp_path: Path) -> None:
    counts = []
    for layers in (4, 8):
        found = export(make_model("llama", layers=layers), tmp_path / str(layers))
        graph = onnx.load(found.folder / "body.onnx", load_external_data=False).graph
        counts.append(len(graph.node))
    per_layer = (counts[1] - counts[0]) / 4
    assert per_layer == np.floor(per_layer)
    assert counts[0] - 4 * per_layer < 40  # what all layers share
