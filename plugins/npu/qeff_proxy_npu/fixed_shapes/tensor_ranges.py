"""The range of values of each tensor of a graph on given inputs, for a quantizer.

ONNX Runtime's own calibrator copies the weights several times. Here the graph of fixed shapes runs
unchanged, its weights mapped from their file, with the smallest and largest element of every
floating tensor as additional outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import onnxruntime
from qeff_proxy.arrays import Array
from qeff_proxy.backends.onnxruntime.open_graph import open_graph, run_graph

from qeff_proxy_npu.fixed_shapes.compiler_fixes import constants_of

if TYPE_CHECKING:
    from qeff_proxy_npu.fixed_shapes.host_split import HostSplit

__all__ = ["RangeSession", "Ranges", "bound_masks"]

#: Tensor name → smallest and largest element.
Ranges = dict[str, tuple[float, float]]

#: Operators that move elements and change none.
_MOVES = {"Identity", "Cast", "Reshape", "Transpose", "Slice", "Expand", "Squeeze", "Unsqueeze"}
#: A masked score is at least so much below any that counts. Softmax gives it less than e^-16,
#: which is 1e-7, of what it gives that: nothing, in 16 bits.
_BELOW = 16.0


class RangeSession:
    """Runs a graph of fixed shapes and notes the range of every floating tensor.

    Args:
        split: The graph, and what the host computes for it.
        weights: The folder that the weights' files are in.
        into: Ranges, which runs widen.
    """

    def __init__(self, split: HostSplit, weights: Path, into: Ranges) -> None:
        graph = split.body.graph
        self._into = into
        self._host = None if split.host is None else _session(ir.to_proto(split.host), weights)
        self._outputs = [str(value.name) for value in graph.outputs]
        proto = ir.to_proto(split.body)
        self._names = [str(value.name) for value in _floating(graph)]
        for name in self._names:
            for operator in ("Min", "Max"):
                end = f"{name}.{operator}"
                proto.graph.node.append(
                    onnx.helper.make_node(f"Reduce{operator}", [name], [end], keepdims=0)
                )
                proto.graph.output.append(
                    onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [])
                )
        self._session = _session(proto, weights)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run it once, on arrays of exactly its sizes, and widen the ranges."""
        known = dict(feeds)
        if self._host is not None:
            known.update(run_graph(self._host, known))
        found = run_graph(self._session, known)
        for name in self._names:
            low, high = float(found[f"{name}.Min"]), float(found[f"{name}.Max"])
            before = self._into.get(name, (low, high))
            self._into[name] = (min(low, before[0]), max(high, before[1]))
        return {name: found[name] for name in self._outputs}

    def close(self) -> None:
        """Release the graph."""
        del self._session, self._host


def bound_masks(
    graph: ir.Graph, masks: Iterable[str], ranges: Mapping[str, tuple[float, float]]
) -> tuple[float, Ranges]:
    """Find how low a mask has to go, and the ranges of scores that it was added to.

    A mask of -30,000 would leave a scale of 8 or 16 bits nothing for the scores: 65,536 steps of
    0.46. So a mask goes only as low as hides a score: below the lowest score that there is, even
    where it is added to the highest. What lies below the range of the sum is its lowest number.

    Args:
        graph: Takes additive masks, 0 where a query may see a key.
        masks: Their names among its inputs.
        ranges: Of its tensors, from runs with any masks.

    Returns:
        The lowest number that masks need, and the ranges of all tensors that depend on masks and
        are no result of a softmax yet.
    """
    wanted = set(masks)
    # Tensor → the range of its elements that no mask hides.
    visible: dict[ir.Value, tuple[float, float]] = {
        value: (0.0, 0.0) for value in graph.inputs if value.name in wanted
    }
    for node in graph:
        masked = [value for value in node.inputs if value in visible]
        if len(masked) != 1:
            continue
        low, high = visible[masked[0]]
        if node.op_type in _MOVES:
            visible[node.outputs[0]] = (low, high)
        elif node.op_type == "Add":
            (other,) = [value for value in node.inputs if value is not masked[0]]
            if other is not None and str(other.name) in ranges:
                added = ranges[str(other.name)]
                visible[node.outputs[0]] = (low + added[0], high + added[1])
    spans = [high - low for low, high in visible.values()]
    lowest = -(max(spans, default=0.0) + _BELOW)
    bounded = {
        str(value.name): (low - _BELOW, high) if high > low else (lowest, 0.0)
        for value, (low, high) in visible.items()
    }
    return lowest, bounded


def _floating(graph: ir.Graph) -> list[ir.Value]:
    """The floating tensors that a graph takes or computes of what it takes, in order."""
    constants = constants_of(graph)
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [
        value
        for value in values
        if value.name
        and value not in constants
        and value.dtype == ir.DataType.FLOAT
        and (value.shape is None or 0 not in value.shape.numpy())
    ]


def _session(proto: onnx.ModelProto, weights: Path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    # Every tensor must be computed, and the weights stay in their file.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    return open_graph(proto.SerializeToString(), settings, weights=weights)
