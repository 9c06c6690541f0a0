"""Insert the missing layers into a graph traced with the first few.

Running the whole part shows how its layers are connected:
`qeff_proxy.export.repeat.mark_layers.marked_layers` notes each layer's inputs and outputs on random
numbers; a layer without weights outputs random numbers. Each input of such a layer must be

- an output of the layer before it, recognised by its values, which occur nowhere else;
- an input of the part that belongs to this layer, such as its cache;
- or an input that layers in the graph have, too.

Layers with any other input are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.export.repeat.clone_layers import marks_of
from qeff_proxy.export.repeat.mark_layers import (
    LayerCall,
    MarkedLayers,
    NotRepeatable,
    is_absent,
    list_of,
)
from qeff_proxy.export.repeat.marks import DOMAIN
from qeff_proxy.parts import Part
from qeff_proxy.tensor_names import LAYER_NAME


def put_in(
    model: ir.Model, calls: Sequence[LayerCall], seen: MarkedLayers, whole: Part, part: Part
) -> list[LayerCall]:
    """Insert the layers in place, each as a mark that is expanded with the others.

    Args:
        model: The graph of ``part``, with marks.
        calls: The calls of layers while it was traced.
        seen: The calls of layers while ``whole`` was run.
        whole: The part with all layers.
        part: The part with the first layers.

    Returns:
        All calls, by the numbers in the graph.

    Raises:
        NotRepeatable: An input of a layer is not known, or its outputs are used otherwise than
            those of the layers before it.
    """
    graph = model.graph
    edges = _Edges(graph, whole, part)
    layers = _Layers(graph, calls, seen, edges)
    for number, call in enumerate(seen.calls):
        if is_absent(call.module):
            layers.add(number, call)
    layers.hand_on()
    edges.finish(layers)
    return layers.calls


class _Edges:
    """The inputs and outputs of the graph, by their names in the part."""

    def __init__(self, graph: ir.Graph, whole: Part, part: Part) -> None:
        self.graph = graph
        self.whole = whole
        self.inputs = {
            spec.name: value for spec, value in zip(part.inputs, graph.inputs, strict=True)
        }
        self.outputs = {
            spec.name: value for spec, value in zip(part.outputs, graph.outputs, strict=True)
        }
        self._specs = {spec.name: spec for spec in whole.inputs}

    def input(self, name: str) -> ir.Value:
        """The input of that name; a layer's that is not in the graph yet is made by its spec."""
        if name not in self.inputs:
            spec = self._specs[name]
            dtype = ir.DataType.from_numpy(numpy_dtype(spec.dtype))
            self.inputs[name] = ir.Value(
                name=name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype)
            )
        return self.inputs[name]

    def of_layers(self) -> set[ir.Value]:
        """The outputs that belong to a layer."""
        return {value for name, value in self.outputs.items() if LAYER_NAME.fullmatch(name)}

    def finish(self, layers: _Layers) -> None:
        """Set inputs and outputs of all layers, in order."""
        order = [spec.name for spec in self.whole.inputs]
        self.graph.inputs.clear()
        self.graph.inputs.extend(self.inputs[name] for name in order if name in self.inputs)
        if len(self.graph.inputs) != len(order):
            raise NotRepeatable("a layer does not use an input of its own")
        outputs = [
            self.outputs[spec.name] if spec.name in self.outputs else layers.output(spec.name)
            for spec in self.whole.outputs
        ]
        self.graph.outputs.clear()
        self.graph.outputs.extend(outputs)


class _Layers:
    """The layers of the graph, by the numbers of their calls in the run."""

    def __init__(
        self, graph: ir.Graph, calls: Sequence[LayerCall], seen: MarkedLayers, edges: _Edges
    ) -> None:
        self.graph = graph
        self.calls = list(calls)
        self.seen = seen
        self.edges = edges
        self.last: dict[str, int] = {}  # list → its latest call
        self.there: dict[str, list[int]] = {}  # list → the calls of layers with weights
        self.handed: dict[str, set[int]] = {}  # list → the outputs that go to the next layer
        self.numbers: dict[int, int] = {}  # number in the run → number in the graph
        self.given: dict[int, list[ir.Value]] = {}  # number in the run → inputs
        self.left: dict[int, Sequence[ir.Value]] = {}  # number in the run → outputs
        self._match(calls)

    def _match(self, calls: Sequence[LayerCall]) -> None:
        """Find the layers with weights in the graph: run and trace called them alike."""
        enter, leave, layer = (marks_of(self.graph, kind) for kind in ("enter", "leave", "layer"))
        present = [n for n, call in enumerate(self.seen.calls) if not is_absent(call.module)]
        paths = [self.seen.calls[number].path for number in present]
        if paths != [call.path for call in calls]:
            raise NotRepeatable("a model with more layers calls its layers otherwise")
        for traced, number in enumerate(present):
            if traced not in layer and traced not in leave:
                continue  # no output of the part depends on it
            if traced in layer:
                first = last = layer[traced]
            else:
                first, last = enter[traced], leave[traced]
            count = len(self.seen.given[number])
            if len(first.inputs) != count + (len(last.outputs) if first is last else 0):
                raise NotRepeatable(f"{calls[traced].path} was given other inputs when it was run")
            self.numbers[number] = traced
            self.given[number] = [value for value in first.inputs[:count] if value is not None]
            self.left[number] = last.outputs
            path = list_of(calls[traced])
            self.there.setdefault(path, []).append(number)
            self.last[path] = number

    def add(self, number: int, call: LayerCall) -> None:
        """Insert a mark for a layer behind the one before it."""
        path = list_of(call)
        if path not in self.last or call.template not in self.numbers:
            raise NotRepeatable(f"no layer with weights before {call.path} is like it")
        template = self.numbers[call.template]
        inputs = [
            self._value_of(number, call, position)
            for position in range(len(self.seen.given[number]))
        ]
        like = self.left[call.template]
        node = ir.Node(
            DOMAIN,
            "layer",
            [*inputs, *like],
            [ir.AttrInt64("number", len(self.calls)), ir.AttrInt64("template", template)],
            num_outputs=len(like),
            version=1,
        )
        for value, other in zip(node.outputs, like, strict=True):
            value.name = f"{other.name}_{call.path}_{number}"
            value.shape, value.type = other.shape, other.type
        before = self.left[self.last[path]]
        behind = before[0].producer()
        assert behind is not None  # noqa: S101 (a mark)
        self.graph.insert_after(behind, node)
        self.numbers[number] = len(self.calls)
        self.calls.append(LayerCall(call.path, call.module, template))
        self.left[number] = node.outputs
        self.last[path] = number

    def _value_of(self, number: int, call: LayerCall, position: int) -> ir.Value:
        """The value in the graph that is an input of a layer."""
        tensor = self.seen.given[number][position]
        for name, given in self.seen.inputs.items():
            copied = given.is_floating_point() and _same(given, tensor)  # a state is
            if given is tensor or copied:
                return self.edges.input(name)
        path = list_of(call)
        before = self.last[path]
        for index, left in enumerate(self.seen.left[before]):
            if _same(left, tensor):
                self.handed.setdefault(path, set()).add(index)
                return self.left[before][index]
        for other in self.there[path]:
            alike = self.seen.calls[other].template == call.template
            if alike and _same(self.seen.given[other][position], tensor):
                return self.given[other][position]
        raise NotRepeatable(f"{call.path} has an input that no other layer has")

    def hand_on(self) -> None:
        """Connect what used the outputs of the last traced layer to the last of all layers."""
        for path, numbers in self.there.items():
            if self.last[path] == numbers[-1]:
                continue  # all layers of this list have weights
            for number in numbers:
                for index, value in enumerate(self.left[number]):
                    last = number == numbers[-1]
                    handed = last and index in self.handed.get(path, ())
                    final = self.left[self.last[path]][index] if handed else None
                    self._hand_on(path, value, final)

    def _hand_on(self, path: str, value: ir.Value, final: ir.Value | None) -> None:
        """Use another value behind the layers, or make sure that this one is not used there."""
        outputs = self.edges.of_layers()
        used = [use for use in value.uses() if not self._stays(use.node, path, outputs)]
        is_output = value.is_graph_output() and value not in outputs
        if final is None:
            if is_output or not all(self._comes_back(use.node, path, outputs) for use in used):
                raise NotRepeatable(f"{value.name} of a layer is used beside the layers")
            return
        for use in used:
            use.node.replace_input_with(use.idx, final)
        for name, output in self.edges.outputs.items():
            if is_output and output is value:
                self.edges.outputs[name] = final

    def _stays(self, node: ir.Node, path: str, outputs: set[ir.Value]) -> bool:
        """Whether a node belongs to a layer: a mark, or a copy for a layer's output."""
        if node.domain == DOMAIN:
            return list_of(self.calls[node.attributes["number"].as_int()]) == path
        return node.op_type == "Identity" and node.outputs[0] in outputs

    def _comes_back(self, node: ir.Node, path: str, outputs: set[ir.Value]) -> bool:
        """Whether only layers of the same list use what a node makes."""
        waiting, seen = [node], set[ir.Node]()
        while waiting:
            user = waiting.pop()
            if user in seen or self._stays(user, path, outputs):
                continue
            seen.add(user)
            if user.domain == DOMAIN or any(value.is_graph_output() for value in user.outputs):
                return False
            waiting += [use.node for value in user.outputs for use in value.uses()]
        return True

    def output(self, name: str) -> ir.Value:
        """The output of an inserted layer: the one that is an output in the layer like it."""
        parts = LAYER_NAME.fullmatch(name)
        for number, call in enumerate(self.seen.calls):
            path, _, index = call.path.rpartition(".")
            if parts is None or index != parts[2] or not is_absent(call.module):
                continue
            like = self.seen.calls[call.template].path.removeprefix(f"{path}.")
            value = self.edges.outputs.get(f"{parts[1]}.{like}{parts[3]}")
            outputs = list(self.left[call.template])
            for copies, source in enumerate(_behind(value)):
                if source in outputs:
                    output = self.left[number][outputs.index(source)]
                    return self._copied(output) if copies or output.is_graph_output() else output
        raise NotRepeatable(f"no output of a layer is {name}")

    def _copied(self, value: ir.Value) -> ir.Value:
        node = ir.Node("", "Identity", [value])
        copy, behind = node.outputs[0], value.producer()
        assert behind is not None  # noqa: S101 (a mark)
        copy.name, copy.shape, copy.type = f"{value.name}_copy", value.shape, value.type
        self.graph.insert_after(behind, node)
        return copy


def _behind(value: ir.Value | None) -> Iterator[ir.Value]:
    """A value, and the values that it is a copy of."""
    while value is not None:
        yield value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type == "Identity" else None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
