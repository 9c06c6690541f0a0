"""Faults that are put into graphs: edits of one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.backends.own_process import OwnProcess
from qeff_proxy.graph.name_scopes import NAME_SCOPES
from qeff_proxy.request import Request
from qeff_proxy.session.session import Session

Edit = Callable[[ir.Model], None]

REQUEST = Request(inputs={"input_ids": np.arange(3, 12)[None] * 7 % 97})


def install_fault(patch: pytest.MonkeyPatch, edit: Edit) -> None:
    """Let an edit change every graph that the onnxruntime backend opens for a layer or a group.

    It runs in this process, where the edit is.
    """
    original = OnnxRuntimeBackend.open_once

    def opened(self: Any, export: Any, part: Any, options: Any, folder: Path) -> Session:
        model = ir.load(export.folder / part.file)
        edit(model)
        edited = export.folder / f"{part.file}.edited.onnx"
        ir.save(model, edited)
        part = replace(part, file=edited.name, sha256=sha256_of(edited))
        try:
            return original(self, export, part, options, folder)
        finally:
            edited.unlink()

    patch.setattr(OnnxRuntimeBackend, "open_once", opened)
    patch.setattr(OwnProcess, "open_once", lambda _, *asked: OnnxRuntimeBackend().open_once(*asked))


class Fault:
    """An edit of one node, wherever it is: of the first of its type in a module, by its name."""

    def __init__(self, operator: str, module: str, change: Callable[..., None], nth: int = 0):
        self.operator, self.module, self.change, self.nth = operator, module, change, nth
        self.name: str | None = None

    def __call__(self, model: ir.Model) -> None:
        nodes = [
            node
            for node in model.graph
            if node.op_type == self.operator
            and self.module in node.metadata_props.get(NAME_SCOPES, "")
        ]
        if self.name is None and len(nodes) > self.nth:  # the whole layer comes first
            self.name = nodes[self.nth].name
        for node in nodes:
            if node.name == self.name:
                self.change(node, model.graph)


def attribute(name: str, value: float) -> Callable[..., None]:
    """Another value of an attribute."""

    def change(node: ir.Node, _graph: ir.Graph) -> None:
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
        node.attributes[name] = make(name, value)

    return change


def then(*steps: tuple[str, list[Any]]) -> Callable[..., None]:
    """More operators behind a node's output: type and constants."""

    def change(node: ir.Node, graph: ir.Graph) -> None:
        output = node.outputs[0]
        new, value = [], output
        for number, (operator, constants) in enumerate(steps):
            inputs = [value]
            for place, constant in enumerate(constants):
                name = f"{output.name}_{number}_{place}"
                inputs.append(ir.Value(name=name, const_value=ir.tensor(constant, name=name)))
                graph.register_initializer(inputs[-1])
            new.append(ir.Node("", operator, inputs, num_outputs=1))
            value = new[-1].outputs[0]
            value.name, value.dtype = f"{output.name}_{number}", output.dtype
        for one in reversed(new):
            graph.insert_after(node, one)
        _read_instead(graph, output, value, new[0])

    return change


def _read_instead(graph: ir.Graph, output: ir.Value, value: ir.Value, but: ir.Node) -> None:
    """Let all that reads an output read another value, but for one node."""
    for user, index in list(output.uses()):
        if user is not but:
            user.replace_input_with(index, value)
    for place, one in enumerate(graph.outputs):
        if one is output:
            value.name, output.name = output.name, f"{output.name}_before"
            graph.outputs[place] = value


def instead(number: int) -> Callable[..., None]:
    """One of a node's inputs in place of its output: the node does nothing."""

    def change(node: ir.Node, graph: ir.Graph) -> None:
        output = node.outputs[0]
        same = ir.Node("", "Identity", [node.inputs[number]], num_outputs=1)
        value = same.outputs[0]
        value.name, value.dtype, value.shape = f"{output.name}_same", output.dtype, output.shape
        graph.insert_before(node, same)
        _read_instead(graph, output, value, same)

    return change


def coarse(bits: int) -> Callable[..., None]:
    """Rounded to so many bits behind the point."""
    scale = np.float32(2.0**bits)
    return then(("Mul", [scale]), ("Round", []), ("Div", [scale]))


def _whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def overflow(limit: float = 0.05) -> Callable[..., None]:
    """Larger numbers become infinite, as in a format of a smaller range."""
    scale = np.float32(2.0**64)
    rest = np.float32(np.finfo(np.float32).max / 2.0**64 / limit)  # in two steps: it fits in none
    there, back = [("Mul", [scale]), ("Mul", [rest])], [("Div", [rest]), ("Div", [scale])]
    # ONNX Runtime multiplies scales into a product behind them, so that nothing would overflow.
    return then(*there, ("Neg", []), *back, ("Neg", []))


def untransposed(node: ir.Node, _graph: ir.Graph) -> None:
    """A product reads its square weight as it is stored, instead of the weight's transpose."""
    transpose = node.inputs[1].producer()
    assert transpose is not None
    assert transpose.op_type == "Transpose"
    node.replace_input_with(1, transpose.inputs[0])


def _first_before(rank: int) -> tuple[str, list[Any]]:
    """Zeros for one position, which is the third of the axes, in front of the others."""
    return "Pad", [_whole(*(int(axis == 2) for axis in range(2 * rank)))]


def stale(rank: int = 4) -> Callable[..., None]:
    """The first position of ``[batch, heads, positions, size]`` is zero."""
    return then(("Slice", [_whole(1), _whole(2**60), _whole(2)]), _first_before(rank))


def late(rank: int = 4) -> Callable[..., None]:
    """Each position has the value of the one before."""
    return then(("Slice", [_whole(0), _whole(-1), _whole(2)]), _first_before(rank))
