"""Name the inputs, outputs and axes of a traced graph as its part's specs do.

1. Inputs and outputs get the names of the part's specs, each output a value of its own
   (`separate_outputs`).
2. Dynamic axes get the names of the specs (`_name_axes`); the trace must not have frozen one
   (`_check_axes`).
3. Inputs that no node reads are dropped, and so is what describes the machine that traced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from qeff_proxy.errors import ExportError
from qeff_proxy.graph.name_scopes import NAME_SCOPES
from qeff_proxy.parts import Part, TensorSpec


def separate_outputs(graph: ir.Graph) -> None:
    """Give each output of a graph a value of its own, in place.

    The tap of the last layer may be the part's last hidden state: one value cannot have two names.
    """
    taken: set[ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value in taken:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        taken.add(value)


def set_edges(
    program: ir.Model, part: Part
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Name a graph's inputs, outputs and axes, in place; return the specs of both.

    Raises:
        ExportError: It has other inputs or outputs than the part, or an axis was frozen.
    """
    separate_outputs(program.graph)
    inputs = _named(program.graph.inputs, part.inputs, part, "inputs")
    outputs = _named(program.graph.outputs, part.outputs, part, "outputs")
    _name_axes(program, part)
    _check_axes(program, part)
    _clean(program)
    return (
        tuple(spec for value, spec in inputs if value.is_graph_input()),
        tuple(_spec_of(value, spec) for value, spec in outputs),
    )


def _named(
    values: Sequence[ir.Value], specs: Sequence[TensorSpec], part: Part, kind: str
) -> list[tuple[ir.Value, TensorSpec]]:
    """Name inputs or outputs in the order of the specs."""
    if len(values) != len(specs):
        raise ExportError(
            f"the {part.name} part was traced with {len(values)} {kind} instead of {len(specs)}"
        )
    pairs = list(zip(values, specs, strict=True))
    for value, spec in pairs:
        value.name = spec.name
    return pairs


def _name_axes(program: ir.Model, part: Part) -> None:
    """Rename torch's symbols (``s17``) to the specs' axis names, everywhere in the graph."""
    graph = program.graph
    mapping: dict[str, str] = {}
    for value, spec in zip(graph.inputs, part.inputs, strict=True):
        for dim, axis in zip(value.shape or (), spec.shape, strict=True):
            symbol = getattr(dim, "value", None)
            if isinstance(axis, str) and isinstance(symbol, str) and symbol.isidentifier():
                mapping.setdefault(symbol, axis)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, mapping) for dim in value.shape])
    for value, spec in zip(graph.inputs, part.inputs, strict=True):
        if value.shape is not None:
            dims = [
                axis if not isinstance(dim, int) else dim
                for dim, axis in zip(value.shape, spec.shape, strict=True)
            ]
            value.shape = ir.Shape(dims)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _renamed(dim: int | ir.SymbolicDim, mapping: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    name = re.sub(
        r"[A-Za-z_]\w*", lambda match: mapping.get(match.group(), match.group()), dim.value
    )
    return "past + query" if name == "query + past" else name


def _check_axes(program: ir.Model, part: Part) -> None:
    """Make sure that no dynamic axis of a used input became a constant."""
    for value, spec in zip(program.graph.inputs, part.inputs, strict=True):
        if not value.uses():
            continue
        for index, (dim, axis) in enumerate(zip(value.shape or (), spec.shape, strict=True)):
            if isinstance(axis, str) and isinstance(dim, int):
                raise ExportError(
                    f"the trace froze axis {index} ({axis}) of {spec.name} in the {part.name} "
                    f"part at {dim}",
                    "The model's code depends on that size; its plugin must trace it otherwise.",
                )
    for value, spec in zip(program.graph.outputs, part.outputs, strict=True):
        dims = list(value.shape or ())
        for index, axis in enumerate(spec.shape):
            if index < len(dims) and isinstance(axis, str) and isinstance(dims[index], int):
                raise ExportError(
                    f"the trace froze axis {index} ({axis}) of the output {spec.name} of the "
                    f"{part.name} part at {dims[index]}",
                    "The model's code depends on that size; its plugin must trace it otherwise.",
                )


def _clean(program: ir.Model) -> None:
    """Drop unused inputs, and metadata of the machine and the code that traced."""
    graph = program.graph
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    for value in _values(graph):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
    program.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None
    graph.name = "graph"
    program.producer_name = "qeff-proxy"
    program.producer_version = None


def _spec_of(value: ir.Value, spec: TensorSpec) -> TensorSpec:
    """The output's spec with the axes of the traced graph."""
    if value.shape is None:
        return spec
    dims = (dim if isinstance(dim, int) else dim.value for dim in value.shape)
    shape = tuple(
        dim if dim is not None else axis for dim, axis in zip(dims, spec.shape, strict=True)
    )
    return TensorSpec(spec.name, spec.dtype, shape)
