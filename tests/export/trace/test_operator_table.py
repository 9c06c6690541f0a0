"""PyTorch's table of ONNX operators is made once, and shared without being shared."""

from __future__ import annotations

import torch
from qeff_proxy.export.trace import operator_table as torchlib
from qeff_proxy.export.trace.operator_table import operators_read_once
from torch.onnx._internal.exporter._registration import ONNXRegistry


def test_the_table_is_made_once_and_each_trace_has_its_own() -> None:
    made = ONNXRegistry.from_torchlib()
    torchlib._table.cache_clear()
    with operators_read_once():
        first = ONNXRegistry.from_torchlib()
        target = torch.ops.aten.relu.default
        first.register_op(target, lambda x: x)
        second = ONNXRegistry.from_torchlib()
    assert torchlib._table.cache_info().misses == 1
    assert second.opset_version == made.opset_version
    assert second.functions.keys() == made.functions.keys()
    assert [one.onnx_function for one in second.get_decomps(target)] == [
        one.onnx_function for one in made.get_decomps(target)
    ]
    assert len(first.get_decomps(target)) == len(made.get_decomps(target)) + 1
    assert ONNXRegistry.__dict__["from_torchlib"] is torchlib._ORIGINAL


def test_operators_are_those_of_pytorchs_own_table() -> None:
    made = ONNXRegistry.from_torchlib(20)
    torchlib._table.cache_clear()
    with operators_read_once():
        ours = ONNXRegistry.from_torchlib(20)
    assert ours.functions.keys() == made.functions.keys()
    for target, found in made.functions.items():
        assert [(one.onnx_function, one.is_complex) for one in ours.functions[target]] == [
            (one.onnx_function, one.is_complex) for one in found
        ]
