"""A decoder's graph whose cache is written in place.

An exported graph joins the past and the new keys by ``Concat``: each step copies the whole cache,
and gives back a new one. Here each ``Concat`` becomes a ``ScatterND`` into its first input, at
places that are a new input of the graph, ``cache_places.<heads>``. ONNX Runtime skips the copy
where input and output of a ``ScatterND`` are the same memory, so a session that binds them so
writes the new positions and nothing else.

The axis ``past`` of such a graph is as long as the buffers, and so is ``past + query``: what lies
behind the filled positions is hidden by the masks. Graphs that do anything else with the length of
the past are left as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.onnxruntime.session import PLACES
from qeff_proxy.tensor_names import PAST

_POSITIONS = 2  # the axis of a cache that grows


def write_in_place(model: ir.Model, part: ExportedPart) -> bool:
    """Rewrite ``model``, if it is a decoder whose cache can be written in place.

    Returns:
        Whether it was; otherwise nothing was changed.
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
    """Each cache input with the ``Concat`` that makes it longer; none where one is used else."""
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
    """Whether the sizes of all outputs can be told from the inputs', before the part has run."""
    axes = [axis for spec in part.outputs for axis in spec.shape if isinstance(axis, str)]
    named = {axis for spec in part.inputs for axis in spec.shape}
    terms = {term for axis in axes if axis not in named for term in axis.split(" + ")}
    return all(term in named or term.isdigit() for term in terms)


def _join_of(past: ir.Value, graph: ir.Graph) -> ir.Node | None:
    """The ``Concat`` of a cache input and new positions, if nothing else looks at the input."""
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
    """Which axes a ``Shape`` node gives the lengths of."""
    start = node.attributes.get("start")
    end = node.attributes.get("end")
    first = int(start.value) if start is not None else 0
    last = int(end.value) if end is not None else rank
    return set(range(rank)[first:last])


def _shorten(graph: ir.Graph, node: ir.Node, query: ir.Value) -> None:
    """Have what asks for the length of the past get that of the buffer less the queries.

    What it adds the queries to is then as long as the buffer, as masks and keys are.
    """
    length = ir.node("Shape", [query], attributes={"start": 1, "end": 2}, name=f"{node.name}_query")
    past = ir.node("Sub", [node.outputs[0], length.outputs[0]], name=f"{node.name}_less_query")
    for new in (length, past):
        new.metadata_props.update(node.metadata_props)
    found = past.outputs[0]
    found.type, found.shape = node.outputs[0].type, node.outputs[0].shape
    for user, index in list(node.outputs[0].uses()):
        if user is not past:
            user.replace_input_with(index, found)
    graph.insert_after(node, [length, past])
