"""Take layers whose weights are not there out of a graph, so that what is left can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

from qeff_proxy.layer_calls import NotRepeatable, is_absent
from qeff_proxy.layer_graphs import marks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from qeff_proxy.layer_calls import LayerCall
    from qeff_proxy.parts import Part

__all__ = ["leave_out"]


def leave_out(model: ir.Model, calls: Sequence[LayerCall], whole: Part, part: Part) -> None:
    """Take the layers on the meta device out of a graph that is not expanded yet, in place.

    What goes from layer to layer goes past them. All else that they gave must be no more than
    outputs that ``part`` has not.

    Args:
        model: The graph of ``whole``.
        calls: The calls of layers that were seen while it was traced.
        whole: The part with all layers.
        part: The part with those that are there.

    Raises:
        NotRepeatable: Something else hangs on what they gave.
    """
    graph = model.graph
    kept = {spec.name for spec in part.outputs}
    pairs = list(zip(graph.outputs, whole.outputs, strict=True))
    graph.outputs.clear()
    graph.outputs.extend(value for value, spec in pairs if spec.name in kept)
    absent = _pass_by(graph, calls)
    RemoveUnusedNodesPass()(model)
    for number, node in absent.items():
        if node.graph is not None:
            raise NotRepeatable(f"what {calls[number].path} gives is used beside the layers")
    _drop_inputs(graph, whole, part)


def _drop_inputs(graph: ir.Graph, whole: Part, part: Part) -> None:
    """Drop the inputs that ``part`` has not; who asks for their sizes may ask another."""
    taken = {spec.name for spec in part.inputs}
    pairs = list(zip(graph.inputs, whole.inputs, strict=True))
    alike = {spec.shape: value for value, spec in reversed(pairs) if spec.name in taken}
    for value, spec in pairs:
        if spec.name in taken:
            continue
        if any(use.node.op_type != "Shape" for use in value.uses()) or (
            value.uses() and spec.shape not in alike
        ):
            raise NotRepeatable(f"{spec.name} is used beside its layer")
        if value.uses():
            value.replace_all_uses_with(alike[spec.shape])
        graph.inputs.remove(value)


def _pass_by(graph: ir.Graph, calls: Sequence[LayerCall]) -> dict[int, ir.Node]:
    """Hand what goes from layer to layer past those that are not there; give their nodes."""
    marks = {**marks_of(graph, "leave"), **marks_of(graph, "layer")}
    absent: dict[int, ir.Node] = {}
    last: dict[str, ir.Node] = {}  # of each list: the last layer that is there
    for number, node in sorted(marks.items()):
        call = calls[number]
        layers = call.path.rpartition(".")[0]
        if not is_absent(call.module):
            last[layers] = node
            continue
        absent[number] = node
        given = node.inputs[: len(node.inputs) - len(node.outputs)]  # the rest but tells shapes
        for old, new in zip(node.outputs, last[layers].outputs, strict=False):
            if new in given:
                old.replace_all_uses_with(new, replace_graph_outputs=True)
    return absent
