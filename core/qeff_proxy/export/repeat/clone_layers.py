"""Replace placeholders for layers by clones of a traced layer.

A graph that was traced within `qeff_proxy.export.repeat.mark_layers.marked_layers` has nodes
between marks for one layer of each kind. `expand_layers` clones them for every placeholder, with
that layer's weights and names, and removes the marks.

A node belongs to a layer if it depends on the layer's inputs or weights. All other values that it
uses must be the same for every layer: constants, and values made of shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from qeff_proxy.export.repeat.mark_layers import LayerCall, NotRepeatable
from qeff_proxy.export.repeat.marks import DOMAIN
from qeff_proxy.graph.name_scopes import NAME_SCOPES

#: What shapes, positions and their comparisons are made of.
_COUNTS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def expand_layers(
    model: ir.Model,
    calls: Sequence[LayerCall],
    weights: dict[str, torch.Tensor],
    name_of: Callable[[torch.Tensor, str], str],
) -> None:
    """Expand a graph in place.

    Args:
        model: The graph.
        calls: The calls of layers while it was traced.
        weights: Name of each weight in the graph → its tensor; those of cloned layers are added.
        name_of: Gives the name of a weight, from its tensor and its path in the part's module.

    Raises:
        NotRepeatable: It is not clear which nodes belong to a layer.
    """
    graph = model.graph
    repeated = {call.template for number, call in enumerate(calls) if call.template != number}
    marks = {kind: marks_of(graph, kind) for kind in ("enter", "leave", "layer")}
    shared = _share(graph, marks, calls)
    templates = {
        number: _Template(graph, marks["enter"].get(number), node, calls[number], name_of, shared)
        for number, node in marks["leave"].items()
        if number in repeated
    }
    for number, node in marks["layer"].items():
        call = calls[number]
        _Clone(graph, templates[call.template], call, number, weights, name_of).put(node)
    for kind in ("leave", "enter"):
        for node in marks[kind].values():
            for before, after in zip(node.inputs, node.outputs, strict=True):
                assert before is not None  # noqa: S101 (all inputs of a mark are values)
                _replace(graph, after, before)
            graph.remove(node, safe=True)
    model.graph.opset_imports.pop(DOMAIN, None)


def _share(
    graph: ir.Graph, marks: Mapping[str, Mapping[int, ir.Node]], calls: Sequence[LayerCall]
) -> set[ir.Value]:
    """Let layers use the inputs that all have in common, such as masks, without a mark.

    Returns:
        These inputs.
    """
    shared: set[ir.Value] = set()
    for number, enter in marks["enter"].items():
        clones = [node for n, node in marks["layer"].items() if calls[n].template == number]
        for index, (outer, inner) in enumerate(zip(enter.inputs, enter.outputs, strict=True)):
            if outer is not None and clones and all(node.inputs[index] is outer for node in clones):
                shared.add(outer)
                _replace(graph, inner, outer)
    return shared


def marks_of(graph: ir.Graph, kind: str) -> dict[int, ir.Node]:
    """The marks of a kind (``enter``, ``leave`` or ``layer``), by the number of the call."""
    return {
        node.attributes["number"].as_int(): node
        for node in graph
        if node.domain == DOMAIN and node.op_type == kind
    }


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Replace a value wherever it is used; no two outputs of the graph become one."""
    node = old.producer()
    assert node is not None  # noqa: S101 (marks are nodes)
    if old.is_graph_output():
        if new.producer() is None or new.is_graph_output():
            copy = ir.Node("", "Identity", [new], name=f"{node.name}_output")
            copy.outputs[0].shape, copy.outputs[0].type = new.shape, new.type
            graph.insert_before(node, copy)
            new = copy.outputs[0]
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new
    old.replace_all_uses_with(new)


class _Template:
    """The nodes of the layer that was traced.

    Raises:
        NotRepeatable: It is not clear which these are.
    """

    def __init__(
        self,
        graph: ir.Graph,
        enter: ir.Node | None,
        leave: ir.Node,
        call: LayerCall,
        name_of: Callable[[torch.Tensor, str], str],
        shared: set[ir.Value],
    ) -> None:
        self.call = call
        self.shared = shared
        self.entered: list[ir.Value] = list(enter.outputs) if enter is not None else []
        self.left: list[ir.Value] = [value for value in leave.inputs if value is not None]
        self.weights: dict[str, list[str]] = {}
        for path, name, _ in _weights(call, name_of):
            self.weights.setdefault(name, []).append(path)
        own = set(self.entered)
        self.nodes: list[ir.Node] = []
        needed = _ancestors(self.left, set(self.entered))
        for node in graph:
            if node in needed and any(
                value is not None and (value in own or value.name in self.weights)
                for value in node.inputs
            ):
                self.nodes.append(node)
                own.update(node.outputs)
        self._check(own, leave)

    def _check(self, own: set[ir.Value], leave: ir.Node) -> None:
        path = self.call.path
        inside = set(self.nodes)
        for node in self.nodes:
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise NotRepeatable(f"{path} has branches or loops")
            for value in node.inputs:
                if value is None or value in own or value.name in self.weights:
                    continue
                if not _is_shared(value, self.shared):
                    raise NotRepeatable(f"{path} uses {value.name}, which is not its input")
            for value in node.outputs:
                leaks = any(
                    use.node not in inside and use.node is not leave for use in value.uses()
                )
                if (leaks or value.is_graph_output()) and not _is_count(value):
                    raise NotRepeatable(f"{value.name}, made in {path}, is used outside of it")


def _is_count(value: ir.Value) -> bool:
    rank = len(value.shape) if value.shape is not None else 1
    return value.dtype in _COUNTS and rank <= 1


def _is_shared(value: ir.Value, shared: set[ir.Value]) -> bool:
    """Whether a value is the same for all layers: of constants, shapes and shared inputs."""
    if value.dtype is not None and _is_count(value):
        return True
    sources = {value, *_sources(value, shared)} if value not in shared else set()
    return not any(one.is_graph_input() for one in sources - shared)


def _ancestors(values: Iterable[ir.Value], stop: set[ir.Value]) -> set[ir.Node]:
    """The nodes that values are made by, directly or not, back to the values in ``stop``."""
    nodes: set[ir.Node] = set()
    waiting = [value for value in values if value not in stop]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [value for value in node.inputs if value is not None and value not in stop]
    return nodes


def _sources(value: ir.Value, stop: set[ir.Value]) -> Iterator[ir.Value]:
    """The inputs, initializers and values in ``stop`` whose elements a value depends on."""
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        node = source.producer()
        if node is None or source in stop:
            yield source
        elif node.op_type != "Shape":  # which depends on no element
            waiting += [before for before in node.inputs if before is not None]


def _weights(
    call: LayerCall, name_of: Callable[[torch.Tensor, str], str]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Path in the layer, name in the graph, and tensor of each weight of a layer."""
    module = call.module
    for tensors in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for path, tensor in tensors:
            yield path, name_of(tensor, f"{call.path}.{path}"), tensor


class _Clone:
    """Clones the nodes of one layer for another."""

    def __init__(
        self,
        graph: ir.Graph,
        template: _Template,
        call: LayerCall,
        number: int,
        weights: dict[str, torch.Tensor],
        name_of: Callable[[torch.Tensor, str], str],
    ) -> None:
        self.graph = graph
        self.template = template
        self.call = call
        self.number = number
        self.weights = weights
        self.own = {path: (name, tensor) for path, name, tensor in _weights(call, name_of)}
        self.made: dict[ir.Value, ir.Value] = {}

    def put(self, node: ir.Node) -> None:
        """Replace ``node`` by the clone."""
        inputs = node.inputs[: len(self.template.entered)]
        for inner, outer in zip(self.template.entered, inputs, strict=True):
            assert outer is not None  # noqa: S101 (all inputs of a mark are values)
            self.made[inner] = outer
        clones = [self._cloned(one) for one in self.template.nodes]
        self.graph.insert_before(node, clones)
        for old, new in zip(node.outputs, self.template.left, strict=True):
            value = self._value(new)
            assert value is not None  # noqa: S101 (see above)
            _replace(self.graph, old, value)
        self.graph.remove(node, safe=True)

    def _cloned(self, node: ir.Node) -> ir.Node:
        clone = ir.Node(
            node.domain,
            node.op_type,
            [self._value(value) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}_layer_{self.number}" if node.name else None,
        )
        clone.metadata_props.update(node.metadata_props)
        if NAME_SCOPES in node.metadata_props:
            clone.metadata_props[NAME_SCOPES] = re.sub(
                re.escape(self.template.call.path) + r"(?=[.'])",
                self.call.path,
                node.metadata_props[NAME_SCOPES],
            )
        for before, after in zip(node.outputs, clone.outputs, strict=True):
            after.name = f"{before.name}_layer_{self.number}"
            after.shape, after.type = before.shape, before.type
            self.made[before] = after
        return clone

    def _value(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.made:
            return self.made[value] if value is not None else None
        paths = self.template.weights.get(value.name or "")
        if paths is None:
            return value  # shared by all layers
        name, tensor = self.own[paths[0]]
        if any(self.own[path][0] != name for path in paths):
            raise NotRepeatable(f"{paths[0]} of {self.call.path} is tied in another layer alone")
        initializer = self.graph.initializers.get(name)
        if initializer is None:
            initializer = ir.Value(name=name, shape=value.shape, type=value.type)
            self.graph.initializers[name] = initializer
            self.weights[name] = tensor
        return initializer
