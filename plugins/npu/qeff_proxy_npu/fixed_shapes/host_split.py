"""Move what depends only on positions and padding from a graph to the host.

Rotary tables, ALiBi and the counting of positions are computed from integers, without weights. An
NPU that computes in float16 gets them wrong: the cosine of a position of 500 is off by 4%, of 8,191
by 55%, since the angle has ten bits. On the host they cost nothing and are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from qeff_proxy_npu.fixed_shapes.specialize import WEIGHT_BYTES

__all__ = ["HostSplit", "split_host"]


@dataclass(frozen=True)
class HostSplit:
    """A graph, and the part of it that the host computes.

    Attributes:
        body: The rest of the graph; the results of the host are inputs.
        host: The graph for the host, with inputs of the whole; ``None`` if nothing was moved.
        reasons: Operator of each node that was moved.
    """

    body: ir.Model
    host: ir.Model | None
    reasons: tuple[str, ...] = ()


def split_host(model: ir.Model) -> HostSplit:
    """Divide a graph of fixed shapes; ``model`` becomes the body.

    Nodes move that depend only on integer inputs, small constants and each other. Looking up rows
    of a weight stays with the weight.
    """
    CommonSubexpressionEliminationPass()(model)
    graph = model.graph
    inputs = [value for value in graph.inputs if value.dtype is not None and _is_whole(value)]
    moved = _moved(graph, inputs)
    edge = [
        value
        for node in moved
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in moved for use in value.uses())
    ]
    # Integers that are only reshaped or cast are no reason for a second graph.
    if not any(_is_number(value) for value in edge):
        return HostSplit(model, None)
    if any(value.is_graph_output() for value in edge):
        return HostSplit(model, None)
    used = {value for node in moved for value in node.inputs if value is not None}
    given = [value for value in inputs if value in used]
    part = ir.convenience.extract(graph, given, edge)
    part.name = "host"
    host = ir.Model(part, ir_version=model.ir_version)
    _take_out(graph, moved, edge)
    return HostSplit(model, host, tuple(node.op_type for node in moved))


def _moved(graph: ir.Graph, inputs: Iterable[ir.Value]) -> dict[ir.Node, None]:
    """The nodes to take out, in order."""
    small = {
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes < WEIGHT_BYTES
        and not isinstance(value.const_value, ir.ExternalTensor)  # a parameter, however small
    }
    of_inputs = set(inputs)
    of_constants = set(small)
    found: dict[ir.Node, None] = {}
    constant_nodes: dict[ir.Value, ir.Node] = {}
    for node in graph:
        values = [value for value in node.inputs if value is not None]
        if not all(value in of_inputs or value in of_constants for value in values):
            continue
        if any(value in of_inputs for value in values):
            for value in values:
                _with_constants(value, constant_nodes, found)
            found[node] = None
            of_inputs.update(node.outputs)
        else:
            of_constants.update(node.outputs)
            constant_nodes.update(dict.fromkeys(node.outputs, node))
    return found


def _with_constants(
    value: ir.Value, nodes: dict[ir.Value, ir.Node], found: dict[ir.Node, None]
) -> None:
    """Put what ``value`` is computed of into ``found``, where that is constants alone."""
    node = nodes.get(value)
    if node is None or node in found:
        return
    for source in node.inputs:
        if source is not None:
            _with_constants(source, nodes, found)
    found[node] = None


def _take_out(graph: ir.Graph, moved: Iterable[ir.Node], edge: Iterable[ir.Value]) -> None:
    """Let the body take the values of the edge as inputs, and drop what nothing uses any more."""
    kept: list[ir.Value] = []
    for value in edge:
        fed = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.replace_all_uses_with(fed)
        value.name = f"{value.name}.on_host"
        kept.append(fed)
    for node in reversed(list(moved)):
        if not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    graph.inputs.extend(kept)


def _is_whole(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)


def _is_number(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
