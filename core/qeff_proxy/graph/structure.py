"""Compare graphs by what they compute, whatever their tensors are called and their weights are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

#: Constants of at most so many bytes are part of the structure: shapes, axes, an epsilon.
_SMALL = 256


def structure_of(model: ir.Model) -> str:
    """A hash that two graphs share if they differ in names and in the values of weights only."""
    numbers: dict[ir.Value | None, int] = {None: 0}
    lines: list[object] = []

    def number(value: ir.Value | None) -> int:
        if value not in numbers:
            assert value is not None  # noqa: S101 (it has a number)
            numbers[value] = len(numbers)
            tensor = value.const_value
            small = tensor is not None and tensor.nbytes <= _SMALL
            content = tensor.tobytes() if tensor is not None and small else b""
            lines.append((str(value.dtype), str(value.shape), content))
        return numbers[value]

    inputs = [number(value) for value in model.graph.inputs]
    for node in model.graph:
        attributes = sorted((name, str(one.value)) for name, one in node.attributes.items())
        operands = [number(value) for value in (*node.inputs, *node.outputs)]
        lines.append((node.domain, node.op_type, attributes, len(node.inputs), operands))
    lines.append((inputs, [number(value) for value in model.graph.outputs]))
    return hashlib.sha256(repr(lines).encode()).hexdigest()


def structure_of_file(path: Path) -> str:
    """`structure_of` an ONNX file; its weights are not read."""
    return structure_of(ir.load(path))
