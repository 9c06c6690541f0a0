"""The operators of a layer's graph: run alone on the CPU, or cut out as a small graph of a few.

All values are those of one run, so that every shape is a number. Values that follow from weights
and shapes alone are constants here: whole numbers are folded into the small graphs, and what
computes the others (a weight's transpose) goes with the operators that read it.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper

from qeff_proxy.arrays import Array
from qeff_proxy.backends.onnxruntime.open_graph import open_graph
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.graph.split_layers import LayerGraph, read_by
from qeff_proxy.parts import TensorSpec

#: Values of a run, by name.
Values = Mapping[str, Array]

#: Inputs of at most so many bytes are constants of an operator that runs alone: kernels want axes
#: and sizes so.
_SMALL = 256
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})


class PlainRuntime:
    """Runs one operator at a time in ONNX Runtime on the CPU, without any optimization.

    Args:
        model: The graph whose operators it runs; tells opsets and functions.
    """

    def __init__(self, model: ir.Model) -> None:
        self._opsets = [helper.make_opsetid(name, v) for name, v in model.opset_imports.items()]
        self._functions = [ir.serde.serialize_function(one) for one in model.functions.values()]
        self._ir_version = model.ir_version or onnx.IR_VERSION
        self._sessions: dict[object, object] = {}

    def run(self, node: ir.Node, values: Values) -> list[Array]:
        """The outputs of an operator, in order.

        Args:
            node: The operator.
            values: All that it reads, by name.
        """
        arrays = {name: np.asarray(values[name]) for name in names_read(node)}
        small = {n: a for n, a in arrays.items() if a.nbytes <= _SMALL and a.dtype.kind in "biu"}
        key = self._key(node, arrays, small)
        session = self._sessions.get(key)
        if session is None:
            graph = self._graph(node, arrays, small)
            settings = onnxruntime.SessionOptions()
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = self._sessions[key] = open_graph(graph.SerializeToString(), settings)
        order = [name for name in arrays if name not in small]
        feeds = {f"i{number}": arrays[name] for number, name in enumerate(order)}
        return list(session.run(None, feeds))  # type: ignore[attr-defined]

    def _key(self, node: ir.Node, arrays: Values, small: Values) -> object:
        """What two operators share that can share a session."""
        inner = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
        order = {name: number for number, name in enumerate(arrays)}
        return (
            node if inner else (node.domain, node.op_type, node.overload),
            tuple(sorted((name, str(one.value)) for name, one in node.attributes.items())),
            tuple(order.get(str(v.name)) if v is not None else None for v in node.inputs),
            tuple(bool(value.name) for value in node.outputs),
            tuple((a.dtype.str, small[n].tobytes() if n in small else None, a.ndim)
                  for n, a in arrays.items()),
        )  # fmt: skip

    def _graph(self, node: ir.Node, arrays: Values, small: Values) -> onnx.ModelProto:
        """A model of one operator, whose inputs are ``i0``, ``i1`` … in order."""
        proto = ir.serde.serialize_node(node)
        inner = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
        order = [name for name in arrays if name not in small]
        new = {name: name if inner else f"i{number}" for number, name in enumerate(order)}
        constants = [onnx.numpy_helper.from_array(a, name) for name, a in small.items()]
        del proto.input[:]
        proto.input.extend(
            "" if value is None else new.get(str(value.name), str(value.name))
            for value in node.inputs
        )
        inputs = [
            helper.make_tensor_value_info(
                f"i{number}", helper.np_dtype_to_tensor_dtype(arrays[name].dtype), None
            )
            for number, name in enumerate(order)
        ]
        names = [helper.make_node("Identity", [f"i{n}"], [name]) for n, name in enumerate(order)]
        outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = helper.make_graph(
            [*(names if inner else ()), proto], "operator", inputs, outputs, constants
        )
        return helper.make_model(
            graph,
            opset_imports=self._opsets,
            functions=self._functions,
            ir_version=self._ir_version,
        )


@dataclass(frozen=True)
class Group:
    """Some operators as a graph of their own.

    Attributes:
        graph: The graph, with fixed shapes; its weights are where those of the layer are.
        inputs: Its inputs: the graph's name → the layer's.
        outputs: Its outputs, likewise.
        operators: Type and name of each operator, without those that prepare its weights.
    """

    graph: LayerGraph
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    operators: tuple[str, ...]


class Operators:
    """A layer's operators, with the values of one run.

    Args:
        layer: The layer's graph.
        feeds: Its inputs in that run.
        plain: Runs its operators; by default one of its own.
        measured: Values of another run, of a device's dump; what reads them is computed from them.

    Raises:
        UnsupportedModelError: It is in bfloat16.
    """

    def __init__(
        self,
        layer: LayerGraph,
        feeds: Values,
        plain: PlainRuntime | None = None,
        measured: Values | None = None,
    ) -> None:
        if any(spec.dtype == "bfloat16" for spec in (*layer.inputs, *layer.outputs)):
            raise UnsupportedModelError(
                "operators run one by one in ONNX Runtime on the CPU, which does not take bfloat16",
                "Export in float32 (--dtype float32).",
            )
        self.layer = layer
        self.model = layer.model
        self._plain = plain or PlainRuntime(layer.model)
        self._constants = {
            str(v.name): v.const_value.numpy()
            for v in layer.model.graph.initializers.values()
            if v.const_value is not None
        }
        #: What follows from weights and shapes alone.
        self._fixed: dict[str, ir.Node] = {}
        nodes = []
        for node in layer.model.graph:
            known = all(n in self._fixed or n in self._constants for n in names_read(node))
            if node.op_type in ("Shape", "Size") or (known and node.op_type not in _RANDOM):
                self._fixed.update({str(value.name): node for value in node.outputs})
            else:
                nodes.append(node)
        #: The operators, in an order in which they can run.
        self.nodes: tuple[ir.Node, ...] = tuple(nodes)
        #: What was computed in the place of measured values.
        self.computed: dict[str, Array] = {}
        #: The reference's value of everything in the layer.
        self.values: Values = self._run_all(feeds, measured or {})

    def with_values(self, values: Values) -> Operators:
        """The same operators with other values for the reference's."""
        other = copy.copy(self)
        other.values = values
        return other

    def free_pages(self) -> None:
        """Let the weights' pages go, which are mapped; who reads one gets it from the file again.

        A backend that opens the layer would have its weights in memory a second time.
        """
        for value in self.model.graph.initializers.values():
            mapped = getattr(value.const_value, "raw", None)
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def outputs(self) -> list[str]:
        """The names of the layer's outputs."""
        return [spec.name for spec in self.layer.outputs]

    def is_fixed(self, name: str) -> bool:
        """Whether a value is a weight, or follows from weights and shapes alone."""
        return name in self._constants or name in self._fixed

    def maker_of_fixed(self, name: str) -> ir.Node | None:
        """What computes such a value; ``None`` for a weight, and for any other value."""
        return self._fixed.get(name)

    def results(self, values: Values) -> dict[str, Array]:
        """The layer's outputs among values."""
        return {name: values[name] for name in self.outputs}

    def _run_all(self, feeds: Values, measured: Values) -> dict[str, Array]:
        values: dict[str, Array] = {**self._constants, **feeds}
        for node in self.model.graph:
            self._evaluate(node, values)
            for name in [str(v.name) for v in node.outputs if v.name in measured]:
                self.computed[name] = values[name]
                if measured[name].shape == values[name].shape:
                    values[name] = measured[name].astype(values[name].dtype)
        return values

    def _evaluate(self, node: ir.Node, values: dict[str, Array]) -> None:
        if node.op_type == "Transpose" and names_read(node)[0] in self._constants:
            # A view: a copy of each weight would be the layer once more in memory.
            axes = node.attributes.get("perm")
            order = list(axes.as_ints()) if axes is not None else None
            values[str(node.outputs[0].name)] = np.transpose(values[names_read(node)[0]], order)
            return
        outputs = [value for value in node.outputs if value.name]
        for value, array in zip(outputs, self._plain.run(node, values), strict=True):
            values[str(value.name)] = array

    def run_on(self, changed: Values, without: Iterable[int] = ()) -> dict[str, Array]:
        """Run what depends on changed values.

        Args:
            changed: Values that differ from the reference's.
            without: Numbers of operators that do not run: ``changed`` has their outputs.

        Returns:
            All values.
        """
        values = {**self.values, **changed}
        dirty = set(changed)
        left_out = set(without)
        for number, node in enumerate(self.nodes):
            if number not in left_out and not dirty.isdisjoint(names_read(node)):
                before = dirty.intersection(str(value.name) for value in node.outputs)
                if not before:
                    self._evaluate(node, values)
                    dirty.update(str(value.name) for value in node.outputs)
        return values

    def run_these(self, numbers: Iterable[int], values: Values) -> dict[str, Array]:
        """Run some operators exactly on values that need not be the reference's."""
        found = {**self.values, **values}
        for number in sorted(numbers):
            self._evaluate(self.nodes[number], found)
        return found

    @cached_property
    def _readers(self) -> dict[str, list[int]]:
        readers: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in names_read(node):
                readers.setdefault(name, []).append(number)
        return readers

    def after(self, numbers: Iterable[int]) -> set[int]:
        """The operators that depend on some others, without these."""
        start = set(numbers)
        found = set(start)
        for number in range(min(start, default=0), len(self.nodes)):
            if number in found:
                for value in self.nodes[number].outputs:
                    found.update(self._readers.get(str(value.name), ()))
        return found - start

    def around(self, numbers: Iterable[int]) -> tuple[set[int], set[int]]:
        """All other operators: those that depend on none of these, and those that do."""
        chosen = set(numbers)
        after = self.after(chosen)
        return set(range(len(self.nodes))) - chosen - after, after

    def is_closed(self, numbers: Iterable[int]) -> bool:
        """Whether no value leaves these operators and comes back to them through others."""
        chosen = set(numbers)
        return not (self.after(self._outside_readers(chosen)) & chosen)

    def _outside_readers(self, chosen: set[int]) -> set[int]:
        names = [str(value.name) for number in chosen for value in self.nodes[number].outputs]
        return {reader for name in names for reader in self._readers.get(name, ())} - chosen

    def group(self, numbers: Iterable[int]) -> Group:
        """Some operators as a graph of their own, with the shapes of this run.

        Args:
            numbers: Which; `is_closed` must hold.
        """
        chosen = sorted(set(numbers))
        made = {str(v.name) for number in chosen for v in self.nodes[number].outputs if v.name}
        inputs, folded = self._read_from_outside(chosen, made)
        kept = set(self.outputs)
        outputs = [
            name
            for name in sorted(made, key=list(made).index)
            if name in kept or set(self._readers.get(name, ())) - set(chosen)
        ]
        graph = ir.convenience.extract(self.model.graph, [*inputs, *folded], outputs)
        for value in list(graph.inputs):
            name = str(value.name)
            if name in folded:
                graph.inputs.remove(value)
                value.const_value = ir.tensor(np.ascontiguousarray(self.values[name]), name=name)
                graph.register_initializer(value)
        self._fix_shapes(graph)
        new_inputs = {f"in_{n}": str(v.name) for n, v in enumerate(graph.inputs)}
        new_outputs = {f"out_{n}": str(v.name) for n, v in enumerate(graph.outputs)}
        for names, values in ((new_inputs, graph.inputs), (new_outputs, graph.outputs)):
            for new, value in zip(names, values, strict=True):
                value.name = new
        model = ir.Model(
            graph,
            ir_version=self.model.ir_version or onnx.IR_VERSION,
            functions=list(self.model.functions.values()),
        )
        specs = [
            tuple(self._spec(new, old) for new, old in names.items())
            for names in (new_inputs, new_outputs)
        ]
        called = tuple(f"{self.nodes[n].op_type} {self.nodes[n].name}" for n in chosen)
        return Group(LayerGraph(self.layer.layer, model, *specs), new_inputs, new_outputs, called)

    def _read_from_outside(
        self, chosen: Sequence[int], made: set[str]
    ) -> tuple[list[str], list[str]]:
        """The inputs of operators; and the constants to fold."""
        inputs: dict[str, None] = {}
        folded: dict[str, None] = {}
        waiting = [self.nodes[number] for number in chosen]
        seen = set()
        while waiting:
            for name in names_read(waiting.pop(0)):
                if name in made or name in self._constants or name in seen:
                    continue
                seen.add(name)
                if name not in self._fixed:
                    inputs[name] = None
                elif self.values[name].dtype.kind in "biu":
                    folded[name] = None
                else:
                    waiting.append(self._fixed[name])
        return list(inputs), list(folded)

    def _fix_shapes(self, graph: ir.Graph) -> None:
        for value in (*graph.inputs, *(one for node in graph for one in node.outputs)):
            array = self.values.get(str(value.name))
            if array is not None:
                value.shape = ir.Shape(array.shape)
                value.dtype = ir.DataType.from_numpy(array.dtype)

    def _spec(self, new: str, old: str) -> TensorSpec:
        array = self.values[old]
        return TensorSpec(new, array.dtype.name, array.shape)


def names_read(node: ir.Node) -> list[str]:
    """The names of the values that a node reads, each once, in its subgraphs too."""
    inner = {
        value
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for one in ir.traversal.RecursiveGraphIterator(attribute.as_graph())
        for value in one.outputs
    }
    return list(dict.fromkeys(str(v.name) for v in read_by(node) if v not in inner and v.name))
