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

    def declare(value: ir.Value) -> None:
        numbers[value] = len(numbers)
        lines.append((str(value.dtype), str(value.shape)))

    for value in model.graph.inputs:
        declare(value)
    for value in model.graph.initializers.values():
        declare(value)
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _SMALL:
            lines.append(tensor.tobytes())
    for node in model.graph:
        for value in node.outputs:
            declare(value)
        attributes = sorted((name, str(one.value)) for name, one in node.attributes.items())
        lines.append((node.domain, node.op_type, attributes, [numbers[v] for v in node.inputs]))
    lines.append([numbers[value] for value in model.graph.outputs])
    return hashlib.sha256(repr(lines).encode()).hexdigest()


def structure_of_file(path: Path) -> str:
    """`structure_of` an ONNX file; its weights are not read."""
    return structure_of(ir.load(path))
