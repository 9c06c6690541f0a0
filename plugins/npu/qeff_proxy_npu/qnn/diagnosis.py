"""Which nodes the Qualcomm compiler refuses, and why, with the layer that each belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from qeff_proxy.graph.name_scopes import layer_of

__all__ = ["LeftNode", "first_failing_node", "nodes_left", "reasons_in"]

_REFUSED = re.compile(
    r"Validation FAILED for \d+ nodes.*?\n(?P<nodes>(?:\s+Operator type: .*\n)+)"
    r"\s*REASON : (?P<why>[^\n]*)"
)
_NODE = re.compile(r"Operator type: (\S+) Node name: (\S+)")


@dataclass(frozen=True)
class LeftNode:
    """A node that is not on HTP.

    Attributes:
        operator: Its operator.
        name: Its name in the graph.
        layer: The layer it belongs to, counted from 0; ``None`` for none.
        reason: What the compiler says.
    """

    operator: str
    name: str
    layer: int | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.operator} node {self.name}{where}" + (
            f" ({self.reason})" if self.reason else ""
        )

    def to_json(self) -> dict[str, object]:
        """The node as a JSON object."""
        return dict(vars(self))


def nodes_left(context: ir.Model, graph: ir.Graph, reasons: dict[str, str]) -> list[LeftNode]:
    """The nodes that the compiled model holds besides context binaries.

    Args:
        context: The compiled model.
        graph: What was compiled.
        reasons: Node name → why it was refused.
    """
    own = {node.name: node for node in graph}
    return [
        LeftNode(
            node.op_type,
            str(node.name),
            layer_of(own[node.name]) if node.name in own else None,
            reasons.get(str(node.name), ""),
        )
        for node in context.graph
        if node.op_type != "EPContext"
    ]


def reasons_in(log: str) -> dict[str, str]:
    """Node name → reason, from a verbose log."""
    found: dict[str, str] = {}
    for match in _REFUSED.finditer(log):
        for _, name in _NODE.findall(match["nodes"]):
            found[name] = match["why"].strip()
    return found


def first_failing_node(
    model: ir.Model, fails: Callable[[ir.Model], bool], most_tries: int = 12
) -> ir.Node | None:
    """Find the node with which a graph begins to fail, by bisection over its beginnings.

    Args:
        model: A graph that fails as a whole.
        fails: Whether a graph fails.
        most_tries: Give up after so many.

    Returns:
        The last node of the shortest beginning that fails; ``None`` where none was found.
    """
    nodes = list(model.graph)
    low, high = 0, len(nodes)  # the beginning of `low` nodes passes, that of `high` fails
    for _ in range(most_tries):
        if high - low <= 1:
            return nodes[high - 1]
        middle = (low + high) // 2
        if fails(_beginning(model, nodes[:middle])):
            high = middle
        else:
            low = middle
    return None


def _beginning(model: ir.Model, nodes: Sequence[ir.Node]) -> ir.Model:
    """The first nodes of a graph, as a graph that gives what the others would have taken."""
    inside = set(nodes)
    edge = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    taken = {value for node in nodes for value in node.inputs}
    inputs = [value for value in model.graph.inputs if value in taken]
    return ir.Model(ir.convenience.extract(model.graph, inputs, edge), ir_version=model.ir_version)
