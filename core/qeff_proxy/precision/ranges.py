"""The values of a graph's tensors, as far as a narrower number format cares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array

#: float16's largest number, and its smallest normal one.
LARGEST, SMALLEST = 65504.0, 2.0**-14
#: What lies below this where a mask was added is hidden by it.
_HIDDEN = -1e4
#: A hidden score is at least so much below any other: nothing after a softmax.
_BELOW = 16.0


@dataclass(frozen=True)
class Range:
    """The values of a tensor over all calls.

    Attributes:
        low: The smallest that no mask hides.
        high: The largest.
        over: How many are beyond float16.
        small: How many are not 0 and below float16's normal numbers.
        count: How many there are.
    """

    low: float
    high: float
    over: int
    small: int
    count: int

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def joined(self, other: Range | None) -> Range:
        """Of both."""
        if other is None:
            return self
        return Range(
            min(self.low, other.low),
            max(self.high, other.high),
            self.over + other.over,
            self.small + other.small,
            self.count + other.count,
        )


#: By the tensor's name.
Ranges = Mapping[str, Range]


def range_of(array: Array, *, masked: bool = False) -> Range | None:
    """The range of an array's finite elements; ``None`` where there are none."""
    seen = array[np.isfinite(array)]
    below = 0.0
    if masked:
        visible = seen[seen > _HIDDEN]
        below = _BELOW if visible.size < array.size else 0.0
        seen = visible
    if not seen.size:
        return None
    size = np.abs(seen)
    return Range(
        float(seen.min()) - below,
        float(seen.max()),
        int((size > LARGEST).sum()),
        int(((size > 0) & (size < SMALLEST)).sum()),
        int(seen.size),
    )


def depends_on(graph: ir.Graph, names: Iterable[str], until: Iterable[str] = ()) -> Set[ir.Value]:
    """The values that depend on some inputs, these included.

    Args:
        graph: The graph.
        names: Of its inputs.
        until: Types of operators whose results are not followed.
    """
    wanted, ends = set(names), set(until)
    found: set[ir.Value] = {value for value in graph.inputs if value.name in wanted}
    for node in graph:
        if node.op_type not in ends and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
