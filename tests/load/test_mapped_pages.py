"""Pages of mapped weights are given back, and what they hold is not lost."""

from __future__ import annotations

import mmap
import sys
import time

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from qeff_proxy.load.mapped_pages import _LIMIT, _file_bytes, few_pages
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.load.weight_sources import StoredWeight, map_tensor
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")

_ROWS, _WIDTH = 24, 1 << 20  # 96 MiB of float32, more than the limit


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> StoredWeight:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"w": torch.arange(_ROWS * _WIDTH, dtype=torch.float32).view(_ROWS, _WIDTH)}, path)
    return StoredWeight(path, "w", read_header(path)["w"])


def test_pages_above_the_limit_are_given_back_meanwhile(weights: StoredWeight) -> None:
    windows: list[mmap.mmap] = []
    tensor = map_tensor(weights, windows)
    before = _file_bytes()
    with few_pages(windows):
        total = float(tensor.double().sum())
        until = time.monotonic() + 20
        while _file_bytes() > before + _LIMIT and time.monotonic() < until:
            time.sleep(0.01)
        assert _file_bytes() <= before + _LIMIT
        assert float(tensor.double().sum()) == total  # read again
    assert _file_bytes() < before + (8 << 20)


def test_pages_are_given_back_when_a_module_is_done(
    weights: StoredWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qeff_proxy.load.mapped_pages._INTERVAL", 60)
    windows: list[mmap.mmap] = []
    layer = torch.nn.Linear(_WIDTH, _ROWS, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(map_tensor(weights, windows))
    before = _file_bytes()
    with few_pages(windows) as give_back, torch.no_grad():
        layer(torch.ones(1, _WIDTH))
        assert _file_bytes() < before + (8 << 20)
        layer.weight.sum()
        assert _file_bytes() > before + (64 << 20)
        give_back()
        assert _file_bytes() < before + (8 << 20)
    layer(torch.ones(1, _WIDTH))
    assert _file_bytes() > before + (64 << 20)  # nobody looks any more


def test_what_was_written_into_a_mapping_stays(weights: StoredWeight) -> None:
    windows: list[mmap.mmap] = []
    written, other = map_tensor(weights, windows), map_tensor(weights, [])
    written[3, 5] = -1
    before = _file_bytes()
    with few_pages([], weights.path.parent) as give_back:
        other.sum()
        give_back()
        assert written[3, 5] == -1
        assert _file_bytes() < before + (8 << 20)


def test_pages_that_onnxruntime_maps_are_given_back(weights: StoredWeight) -> None:
    place = weights.place
    outside = ir.ExternalTensor(
        weights.path.name,
        place.offset,
        place.length,
        ir.DataType.FLOAT,
        shape=ir.Shape(place.shape),
        name="w",
        base_dir=weights.path.parent,
    )
    x = ir.Value(name="x", shape=ir.Shape([1, _ROWS]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=outside)
    product = ir.node("MatMul", [x, w])
    graph = ir.Graph(
        [x], product.outputs, nodes=[product], initializers=[w], opset_imports={"": 20}
    )
    product.outputs[0].name = "y"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    path = weights.path.parent / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    before = _file_bytes()
    ones = {"x": np.ones((1, _ROWS), np.float32)}
    with few_pages([], path.parent):
        (first,) = session.run(None, ones)
    assert _file_bytes() < before + (8 << 20)
    (second,) = session.run(None, ones)
    assert _file_bytes() > before + (64 << 20)  # they were pages of the file
    np.testing.assert_array_equal(first, second)
