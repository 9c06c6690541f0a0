"""Rewrite a graph so that some operators compute in a lower precision, the rest in float32.

The result runs in ONNX Runtime on the CPU. Of each precision, what it does is

- ``fp16``, ``bf16``: the inputs, weights and results of an operator are rounded to it, overflow to
  infinity included; what happens inside one operator is float32, as accelerators accumulate wider
  than they store. Attention masks go no lower than -30,000, as backends make them.
- ``int8``, ``int4``: a product is ONNX Runtime's own, on weights from its own quantizer: not a
  simulation, but what the ``onnxruntime`` backend runs.
- ``a16w8``, ``a8w8``: inputs and results are rounded to 16 or 8 bits over the range that was
  observed (half as far again for 16), weights to 8 bits with a scale for each output; units that
  hold the mean of an RMSNorm are in float16, as on HTP.

Values that depend on positions alone (rotary tables) stay float32, as on the hosts of accelerators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.onnxruntime.options import WeightOptions
from qeff_proxy.backends.onnxruntime.quantize import quantize_weights, weight_of
from qeff_proxy.graph.modules import unit_of, weights_of
from qeff_proxy.precision.ranges import Ranges, depends_on

PRECISIONS = ("fp16", "bf16", "int8", "int4", "a16w8", "a8w8")
_FLOATS = {
    "fp16": (ir.DataType.FLOAT16, numpy_dtype("float16")),
    "bf16": (ir.DataType.BFLOAT16, numpy_dtype("bfloat16")),
}
#: Bits of an activation, and how much wider than what was seen its range is.
_ACTIVATIONS = {"a16w8": (16, 1.5), "a8w8": (8, 1.0)}
_LOWEST_MASK = np.float32(-30000.0)
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Simulation:
    """How a part's operators are made low.

    Attributes:
        precision: Of `PRECISIONS`.
        lowers: Whether the backend computes a part in it at all.
        weights: For ``int8`` and ``int4``, how the backend stores weights, by the part's name.
    """

    precision: str
    lowers: Callable[[ExportedPart], bool]
    weights: Callable[[str], WeightOptions]

    @property
    def calibrates(self) -> bool:
        """Whether it needs the ranges of values."""
        return self.precision in _ACTIVATIONS

    def affected(self, part: ExportedPart, model: ir.Model, inputs: Set[str]) -> set[str]:
        """The units of a graph that it changes.

        Args:
            part: The part.
            model: With its units named.
            inputs: The inputs that carry activations.
        """
        if not self.lowers(part):
            return set()
        if self.precision not in ("int8", "int4"):
            active = depends_on(model.graph, inputs)
            return {unit for node in model.graph if (unit := _lowered(node, active)) is not None}
        products = [node for node in model.graph if weight_of(node) is not None]
        return {unit for node in products if (unit := unit_of(node)) is not None}

    def lower(
        self,
        part: str,
        model: ir.Model,
        low: Set[str],
        inputs: Set[str],
        masks: Set[str],
        ranges: Ranges,
    ) -> ir.Model:
        """A copy of a graph with some units low.

        Args:
            part: The part's name.
            model: With its units named; it is not changed.
            low: The units.
            inputs: The inputs that carry activations.
            masks: The inputs that are attention masks.
            ranges: Of its values, where `calibrates`.
        """
        if not low:
            return model
        copy = model.clone()
        if self.precision in ("int8", "int4"):
            quantize_weights(copy, None, self.weights(part), lambda node: unit_of(node) not in low)
            return copy
        active = depends_on(copy.graph, inputs)
        nodes = [node for node in copy.graph if _lowered(node, active) in low]
        hidden = depends_on(copy.graph, masks, until=("Softmax",))
        half = {unit_of(node) for node in nodes if node.op_type == "ReduceMean"}
        cast: _Rounding = _Cast(copy.graph, hidden, *_FLOATS.get(self.precision, _FLOATS["fp16"]))
        other = cast
        if self.calibrates:
            other = _Steps(copy.graph, ranges, hidden - active, *_ACTIVATIONS[self.precision])
        for node in nodes:
            (cast if unit_of(node) in half else other).apply(node)
        copy.graph.sort()
        copy.opset_imports.setdefault(_MICROSOFT, 1)
        return copy


def _lowered(node: ir.Node, active: Set[ir.Value]) -> str | None:
    """The unit of an operator that computes with activations, or reads a table of weights."""
    reads = any(value in active for value in node.inputs) or node.op_type == "Gather"
    return unit_of(node) if reads else None


class _Rounding(ABC):
    """Rounds what operators of a graph read and give."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._done: dict[ir.Value, ir.Value] = {}
        self._results: set[ir.Value] = set()

    def apply(self, node: ir.Node) -> None:
        """Round an operator's inputs and results."""
        weights = weights_of(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or value in self._results:
                continue
            if value not in self._done:
                if value.is_initializer():
                    tensor = value.const_value
                    assert tensor is not None  # noqa: S101 (it is an initializer)
                    self._done[value] = self._weight(node, index, value, tensor.numpy())
                elif value.producer() is not None and weights and self._is_fixed(value):
                    self._done[value] = self._fixed(node, index, value)
                else:
                    self._done[value] = self.rounded(value)
            node.replace_input_with(index, self._done[value])
        for value in list(node.outputs):
            if value.dtype == ir.DataType.FLOAT:
                self._replace_result(value)

    def _is_fixed(self, value: ir.Value) -> bool:
        """Whether a value is a weight, moved."""
        maker = value.producer()
        while maker is not None and maker.op_type in ("Transpose", "Cast", "Identity"):
            source = maker.inputs[0]
            if source is None or source.is_initializer():
                return source is not None
            maker = source.producer()
        return False

    def _fixed(self, node: ir.Node, index: int, value: ir.Value) -> ir.Value:
        """A weight that a node reads through a transpose: a new weight in that order."""
        maker = value.producer()
        assert maker is not None and maker.inputs[0] is not None  # noqa: S101, PT018
        source = maker.inputs[0]
        if maker.op_type != "Transpose" or source.const_value is None:
            return self.rounded(value)
        order = maker.attributes.get("perm")
        array = np.transpose(source.const_value.numpy(), order.as_ints() if order else None)
        return self._weight(node, index, value, np.ascontiguousarray(array))

    def _replace_result(self, value: ir.Value) -> None:
        """Let all that reads a result read it rounded; an output of the graph keeps its name."""
        uses = list(value.uses())
        rounded = self.rounded(value)
        self._results.add(rounded)
        for node, index in uses:
            node.replace_input_with(index, rounded)
        if value.is_graph_output():
            name = value.name
            self._graph.outputs[list(self._graph.outputs).index(value)] = rounded
            value.name, rounded.name = f"{name}.wide", name

    def _constant(self, name: str, array: Array) -> ir.Value:
        value = self._graph.initializers.get(name)
        if value is None:
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array, name=name),
            )
            self._graph.register_initializer(value)
        return value

    def _node(
        self,
        kind: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        like: ir.Value,
        *,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain)  # type: ignore[arg-type]
        self._graph.append(node)
        result = node.outputs[0]
        result.name = f"{like.name}.{kind.lower()}{len(self._done)}.{len(self._results)}"
        node.name = result.name
        result.type, result.shape = ir.TensorType(dtype), like.shape
        return result

    @abstractmethod
    def rounded(self, value: ir.Value) -> ir.Value:
        """A value, rounded and back in float32."""

    @abstractmethod
    def _weight(self, node: ir.Node, index: int, value: ir.Value, array: Array) -> ir.Value:
        """A rounded weight, or the weight itself."""


class _Cast(_Rounding):
    """Rounds to a narrower floating dtype."""

    def __init__(
        self, graph: ir.Graph, hidden: Set[ir.Value], kind: ir.DataType, dtype: object
    ) -> None:
        super().__init__(graph)
        self._hidden, self._kind, self._dtype = hidden, kind, dtype

    def rounded(self, value: ir.Value) -> ir.Value:
        source = value
        if value in self._hidden:
            lowest = self._constant("lowest_mask", np.asarray(_LOWEST_MASK))
            source = self._node("Max", [value, lowest], ir.DataType.FLOAT, value)
        narrow = self._node("Cast", [source], self._kind, value, to=self._kind)
        return self._node("Cast", [narrow], ir.DataType.FLOAT, narrow, to=ir.DataType.FLOAT)

    def _weight(self, node: ir.Node, index: int, value: ir.Value, array: Array) -> ir.Value:  # noqa: ARG002
        with np.errstate(over="ignore"):
            rounded = array.astype(self._dtype).astype(np.float32)  # type: ignore[call-overload]
        return self._constant(f"{value.name}.narrow", rounded)


class _Steps(_Rounding):
    """Rounds to whole numbers of steps: activations over their range, weights by output."""

    def __init__(
        self, graph: ir.Graph, ranges: Ranges, masks: Set[ir.Value], bits: int, margin: float
    ) -> None:
        super().__init__(graph)
        self._ranges, self._masks, self._bits, self._margin = ranges, masks, bits, margin
        self._dtype = np.uint16 if bits == 16 else np.uint8

    def rounded(self, value: ir.Value) -> ir.Value:
        seen = self._ranges.get(str(value.name))
        if seen is None or value in self._masks:  # the sum with a mask bounds it
            return value
        low, high = min(seen.low * self._margin, 0.0), max(seen.high * self._margin, 0.0)
        scale = max((high - low) / (2**self._bits - 1), float(np.finfo(np.float32).tiny))
        zero = np.clip(round(-low / scale), 0, 2**self._bits - 1)
        given = [
            self._constant(f"{value.name}.scale", np.asarray(scale, np.float32)),
            self._constant(f"{value.name}.zero", np.asarray(zero, self._dtype)),
        ]
        kind = ir.DataType.from_numpy(np.dtype(self._dtype))
        steps = self._node("QuantizeLinear", [value, *given], kind, value, domain=_MICROSOFT)
        wide = ir.DataType.FLOAT
        return self._node("DequantizeLinear", [steps, *given], wide, steps, domain=_MICROSOFT)

    def _weight(self, node: ir.Node, index: int, value: ir.Value, array: Array) -> ir.Value:
        if index != 1 or array.ndim < 2 or node.op_type not in ("MatMul", "Gemm", "Conv"):
            return value  # a bias, a norm's weight or a table: HTP keeps them in 16 or 32 bits
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        rows = array.ndim - 1 if node.op_type == "MatMul" else int(not transposed)
        axis = 0 if node.op_type == "Conv" else rows
        others = tuple(a for a in range(array.ndim) if a != axis)
        scale = np.maximum(np.abs(array).max(others, keepdims=True) / 127, np.float32(1e-30))
        steps = np.clip(np.rint(array / scale), -127, 127) * scale
        return self._constant(f"{value.name}.narrow", steps.astype(np.float32))
