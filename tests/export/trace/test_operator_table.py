"""PyTorch's table of ONNX operators is made once, and each export gets a copy."""

from __future__ import annotations

import torch
from qeff_proxy.export.trace import operator_table
from qeff_proxy.export.trace.operator_table import operators_read_once
from torch.onnx._internal.exporter._registration import ONNXRegistry


def test_the_table_is_made_once_and_each_trace_has_its_own() -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    theirs = ONNXRegistry.from_torchlib()
    operator_table._table.cache_clear()
    with operators_read_once():
        first = ONNXRegistry.from_torchlib()
        target = torch.ops.aten.relu.default
        first.register_op(target, lambda x: x)
        second = ONNXRegistry.from_torchlib()
    assert operator_table._table.cache_info().misses == 1
    assert second.opset_version == theirs.opset_version
    assert second.functions.keys() == theirs.functions.keys()
    assert [one.onnx_function for one in second.get_decomps(target)] == [
        one.onnx_function for one in theirs.get_decomps(target)
    ]
    assert len(first.get_decomps(target)) == len(theirs.get_decomps(target)) + 1
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_operators_are_those_of_pytorchs_own_table() -> None:
    theirs = ONNXRegistry.from_torchlib(20)
    operator_table._table.cache_clear()
    with operators_read_once():
        ours = ONNXRegistry.from_torchlib(20)
    assert ours.functions.keys() == theirs.functions.keys()
    for target, entries in theirs.functions.items():
        assert [(one.onnx_function, one.is_complex) for one in ours.functions[target]] == [
            (one.onnx_function, one.is_complex) for one in entries
        ]
