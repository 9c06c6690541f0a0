"""Rewrite a decoder's graph to update its KV cache in place.

An exported graph concatenates past and new keys, so each step copies the whole cache. Here each
``Concat`` becomes a ``ScatterND`` into its first input, at indices from a new graph input,
``cache_places.<heads>``. ONNX Runtime skips the copy where input and output of a ``ScatterND``
share memory, so a session that binds both to one buffer writes the new positions only.

The axes ``past`` and ``past + query`` of such a graph are as long as the buffers; the masks hide
positions that are not filled yet. Graphs that use the length of the past for anything else are not
changed.
"""

from __future__ import annotations

import onnx_ir as ir

from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.onnxruntime.session import PLACES
from qeff_proxy.tensor_names import PAST

_POSITIONS = 2  # the axis along which a cache grows


def write_in_place(model: ir.Model, part: ExportedPart) -> bool:
    """Rewrite ``model``, if it is a decoder whose cache can be updated in place.

    Returns:
        Whether it was rewritten; otherwise nothing was changed.
    """
    joins = _joins_of(model.graph, part)
    if not joins:
        return False
    graph = model.graph
    query = graph.inputs[0]
    places: dict[int, ir.Value] = {}
    for past, join in joins:
        shape = past.shape
        assert shape is not None  # noqa: S101 (as _joins_of found it)
        heads = int(shape[1])  # type: ignore[arg-type]
        if heads not in places:
            places[heads] = ir.Value(
                name=f"{PLACES}{heads}",
                shape=ir.Shape(["batch", heads, "query", 3]),
                type=ir.TensorType(ir.DataType.INT64),
            )
            graph.inputs.append(places[heads])
        for node, _ in list(past.uses()):
            if node.op_type == "Shape" and _axes_of(node, 4) == {_POSITIONS}:
                _shorten(graph, node, query)
        output = join.outputs[0]
        scatter = ir.node("ScatterND", [past, places[heads], join.inputs[1]], name=join.name)
        scatter.metadata_props.update(join.metadata_props)
        new = scatter.outputs[0]
        new.name, new.type, new.shape = output.name, output.type, shape
        place = list(graph.outputs).index(output)
        graph.outputs[place] = new
        ir.convenience.replace_nodes_and_values(graph, join, [join], [scatter], [output], [new])
    return True


def _joins_of(graph: ir.Graph, part: ExportedPart) -> list[tuple[ir.Value, ir.Node]]:
    """Each cache input and the ``Concat`` that extends it; none if any is used otherwise."""
    masks = {mask.name for mask in part.masks}
    joins: list[tuple[ir.Value, ir.Node]] = []
    specs = {spec.name: spec for spec in part.inputs}
    if not any(name.startswith(PAST) for name in specs):
        return []
    if set(specs) != {value.name for value in graph.inputs}:
        return []
    if not _named_by_inputs(part):
        return []
    if part.inputs[0].name != graph.inputs[0].name or part.inputs[0].shape[1:2] != ("query",):
        return []
    for value in graph.inputs:
        name = str(value.name)
        if name.startswith(PAST):
            join = _join_of(value, graph)
            if join is None or not isinstance(specs[name].shape[1], int):
                return []
            joins.append((value, join))
        elif name not in masks and any("past" in str(axis) for axis in specs[name].shape):
            return []
    return joins


def _named_by_inputs(part: ExportedPart) -> bool:
    """Whether the shapes of all outputs follow from the inputs', before the part has run."""
    axes = [axis for spec in part.outputs for axis in spec.shape if isinstance(axis, str)]
    named = {axis for spec in part.inputs for axis in spec.shape}
    terms = {term for axis in axes if axis not in named for term in axis.split(" + ")}
    return all(term in named or term.isdigit() for term in terms)


def _join_of(past: ir.Value, graph: ir.Graph) -> ir.Node | None:
    """The ``Concat`` of a cache input and new positions, if nothing else uses the input."""
    join = None
    for node, index in past.uses():
        if node.op_type == "Shape" and not node.domain:
            if _POSITIONS in (axes := _axes_of(node, 4)) and axes != {_POSITIONS}:
                return None
        elif node.op_type == "Concat" and not node.domain and join is None and index == 0:
            axis = node.attributes["axis"].value
            if len(node.inputs) != 2 or axis not in (_POSITIONS, _POSITIONS - 4):
                return None
            join = node
        else:
            return None
    if join is None or join.outputs[0] not in graph.outputs or past.shape is None:
        return None
    return join


def _axes_of(node: ir.Node, rank: int) -> set[int]:
    """The axes whose lengths a ``Shape`` node returns."""
    start = node.attributes.get("start")
    end = node.attributes.get("end")
    first = int(start.value) if start is not None else 0
    last = int(end.value) if end is not None else rank
    return set(range(rank)[first:last])


def _shorten(graph: ir.Graph, node: ir.Node, query: ir.Value) -> None:
    """Replace the length of the past by that of the buffer less the number of queries.

    Past plus query is then the length of the buffer, as it is in masks and keys.
    """
    length = ir.node("Shape", [query], attributes={"start": 1, "end": 2}, name=f"{node.name}_query")
    past = ir.node("Sub", [node.outputs[0], length.outputs[0]], name=f"{node.name}_less_query")
    for new in (length, past):
        new.metadata_props.update(node.metadata_props)
    shortened = past.outputs[0]
    shortened.type, shortened.shape = node.outputs[0].type, node.outputs[0].shape
    for user, index in list(node.outputs[0].uses()):
        if user is not past:
            user.replace_input_with(index, shortened)
    graph.insert_after(node, [length, past])
