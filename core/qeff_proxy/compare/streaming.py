"""Run through the records of a pair in blocks, checking their bytes and measuring them.

Nothing larger than a block of each side is in memory. Small records that lie one behind another
are measured together, since the cost of a call would otherwise be that of many elements.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.compare.statistics import STATS, Scratch, measure, merge, to_numbers
from qeff_proxy.dump import Dump, StepInfo, StoredTensor
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import DTYPES

if TYPE_CHECKING:
    from qeff_proxy.compare.pairing import Pair

# Elements of a block: float32 temporaries of this size stay in the processor's cache.
BLOCK = 65_536
# Bytes that the system is asked to fetch while a block is reckoned with.
READ_AHEAD = 1 << 22


class _Side:
    """One file of a pair, open."""

    def __init__(self, tensor: StoredTensor, slot: str, scratch: Scratch) -> None:
        self.slot = slot
        self.scratch = scratch
        self.tensor = tensor
        self.index = tensor.index
        self.itemsize = DTYPES[tensor.index.dtype].itemsize
        self.dtype = np.dtype(tensor.index.stored)
        self.descriptor = tensor.open()
        self.ahead = 0

    def block(self, offset: int, elements: int) -> NDArray[Any]:
        """Return stored elements, until the next block is read."""
        end = (offset + elements) * self.itemsize
        if end + READ_AHEAD // 2 > self.ahead and hasattr(os, "posix_fadvise"):
            begin = max(self.ahead, end)
            self.ahead = end + READ_AHEAD
            os.posix_fadvise(self.descriptor, begin, self.ahead - begin, os.POSIX_FADV_WILLNEED)
        data = self.scratch.take(f"{self.slot} block", (elements,), self.dtype)
        self.tensor.read_bytes(self.descriptor, offset, data.view(np.uint8).data)
        return data

    def check_rows(self, records: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Hold whole records, one a row of stored elements, against their checksums."""
        size = rows.shape[1] * self.itemsize
        data = rows.reshape(-1).view(np.uint8).data
        for at, record in enumerate(records):
            self.tensor.check(int(record), zlib.crc32(data[at * size : (at + 1) * size]))

    def row_range(self, record: int, steps: list[StepInfo]) -> tuple[int, int]:
        """Return which rows of the cache a record holds."""
        rows = self.index.record_shape(record)[CACHE_AXIS]
        if not self.index.delta:
            return 0, rows
        begin = steps[self.index.positions[record]].past_length or 0
        return begin, begin + rows


def shapes_agree(
    pair: Pair, left: int, right: int, reference: list[StepInfo], candidate: list[StepInfo]
) -> bool:
    """Whether two records can be compared.

    The delta form of a cache tensor can be compared with the full one: in the rows of both.
    """
    first = pair.reference.index.record_shape(left)
    second = pair.candidate.index.record_shape(right)
    one, two = pair.reference.index, pair.candidate.index
    if one.delta and two.delta:
        begins = (
            reference[one.positions[left]].past_length,
            candidate[two.positions[right]].past_length,
        )
        return first == second and begins[0] == begins[1]
    if not one.delta and not two.delta:
        return first == second
    shapes = [list(first), list(second)]
    steps = (reference[one.positions[left]], candidate[two.positions[right]])
    for shape, index, step in zip(shapes, (one, two), steps, strict=True):
        if index.delta and len(shape) == 4:
            shape[CACHE_AXIS] += step.past_length or 0
    return shapes[0] == shapes[1]


def measure_pair(
    pair: Pair,
    usable: NDArray[np.int64],
    elementwise: tuple[float, float] | None,
    reference: Dump,
    candidate: Dump,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Measure the records of one pair.

    Args:
        pair: Two files.
        usable: Which of the pair's common records have shapes that agree.
        elementwise: ``(atol, rtol)`` or None.
        reference: The dump of the one file.
        candidate: The dump of the other.

    Yields:
        Some of ``usable``, and the `STATS` of each.

    Raises:
        BrokenRuleError: The bytes of a record are damaged, or a file is cut short.
    """
    scratch = Scratch()
    left = _Side(pair.reference, "left", scratch)
    try:
        right = _Side(pair.candidate, "right", scratch)
        try:
            if left.index.delta != right.index.delta:
                whole = delta_with_all_rows(pair, reference, candidate)
                for common in usable:
                    records = (
                        int(pair.reference_records[common]),
                        int(pair.candidate_records[common]),
                    )
                    if whole is None:
                        steps = (reference.steps, candidate.steps)
                        stats = _measure_rows(left, right, *records, elementwise, steps)
                    else:
                        stats = _measure_whole(left, right, *records, elementwise, whole)
                    yield np.array([common]), stats
            else:
                yield from _measure_like(pair, left, right, usable, elementwise)
        finally:
            os.close(right.descriptor)
    finally:
        os.close(left.descriptor)


def _numbers(
    left: _Side, right: _Side, one: NDArray[Any], two: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    dtypes = (left.index.dtype, right.index.dtype)
    wide = "float64" in dtypes
    first = to_numbers(one, dtypes[0], wide, left.scratch, left.slot)
    second = to_numbers(two, dtypes[1], wide, right.scratch, right.slot)
    if first.dtype.kind == "b":
        first = first.view(np.uint8)
    if second.dtype.kind == "b":
        second = second.view(np.uint8)
    return first, second


def _measure_like(
    pair: Pair,
    left: _Side,
    right: _Side,
    usable: NDArray[np.int64],
    elementwise: tuple[float, float] | None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Measure records whose shapes are equal."""
    start = 0
    latest: tuple[tuple[int, int], NDArray[Any]] | None = None
    while start < len(usable):
        first, second = pair.reference_records[usable[start]], pair.candidate_records[usable[start]]
        elements = prod(left.index.record_shape(int(first)))
        offsets = (int(left.index.offsets[first]), int(right.index.offsets[second]))
        if latest is not None and latest[0] == offsets and elements:
            yield usable[start : start + 1], latest[1]  # an input that did not change
            start += 1
            continue
        together = _contiguous(pair, left, right, usable, start, elements)
        chosen = usable[start : start + together]
        if elements > BLOCK:
            stats = _measure_large(left, right, int(first), int(second), elementwise)
        else:
            one = left.block(offsets[0], together * elements).reshape(together, elements)
            two = right.block(offsets[1], together * elements).reshape(together, elements)
            left.check_rows(pair.reference_records[chosen], one)
            right.check_rows(pair.candidate_records[chosen], two)
            stats = measure(*_numbers(left, right, one, two), elementwise, left.scratch)
        latest = (offsets, stats) if together == 1 else None
        yield chosen, stats
        start += together


def _contiguous(
    pair: Pair, left: _Side, right: _Side, usable: NDArray[np.int64], start: int, elements: int
) -> int:
    """Return how many records from ``start`` on fit in a block and lie one behind another."""
    most = min(len(usable) - start, BLOCK // max(elements, 1), 4096)
    if most <= 1 or left.index.shape is None or right.index.shape is None:
        return 1
    chosen = usable[start : start + most]
    steps = np.arange(most) * elements
    one = left.index.offsets[pair.reference_records[chosen]]
    two = right.index.offsets[pair.candidate_records[chosen]]
    fits = (one - one[0] == steps) & (two - two[0] == steps)
    return most if fits.all() else int(fits.argmin())


def _measure_large(
    left: _Side,
    right: _Side,
    first: int,
    second: int,
    elementwise: tuple[float, float] | None,
) -> NDArray[Any]:
    elements = prod(left.index.record_shape(first))
    starts = (int(left.index.offsets[first]), int(right.index.offsets[second]))
    total = np.zeros(1, STATS)
    total["unmatched_at"] = -1
    sums = [0, 0]
    for at in range(0, elements, BLOCK):
        count = min(BLOCK, elements - at)
        one, two = left.block(starts[0] + at, count), right.block(starts[1] + at, count)
        sums[0] = zlib.crc32(one.view(np.uint8).data, sums[0])
        sums[1] = zlib.crc32(two.view(np.uint8).data, sums[1])
        numbers = _numbers(left, right, one[None], two[None])
        merge(total[0], measure(*numbers, elementwise, left.scratch)[0], at)
    left.tensor.check(first, sums[0])
    right.tensor.check(second, sums[1])
    return total


def _measure_rows(
    left: _Side,
    right: _Side,
    first: int,
    second: int,
    elementwise: tuple[float, float] | None,
    steps: tuple[list[StepInfo], list[StepInfo]],
) -> NDArray[Any]:
    """Measure the cache rows that a delta record and a whole cache have in common."""
    spans = (left.row_range(first, steps[0]), right.row_range(second, steps[1]))
    begin, end = max(s[0] for s in spans), min(s[1] for s in spans)
    pieces = []
    for side, record, span in ((left, first, spans[0]), (right, second, spans[1])):
        shape = side.index.record_shape(record)
        whole = side.block(int(side.index.offsets[record]), prod(shape))
        side.check_rows(np.array([record]), whole[None])
        rows = whole.reshape(shape)[:, :, begin - span[0] : end - span[0]]
        pieces.append(np.ascontiguousarray(rows).reshape(1, -1))
    return measure(*_numbers(left, right, *pieces), elementwise, left.scratch)


def delta_with_all_rows(pair: Pair, reference: Dump, candidate: Dump) -> Dump | None:
    """The dump of a pair that alone holds a cache as a delta, if none of its rows is missing.

    It can be compared with the other's whole caches in all rows, the older ones too.
    """
    if pair.reference.index.delta == pair.candidate.index.delta:
        return None
    dump = reference if pair.reference.index.delta else candidate
    rows = 0
    for position, step in enumerate(dump.steps):
        tensor = dump.tensors.get((step.phase, pair.name))
        record = -1 if tensor is None else int(np.searchsorted(tensor.index.positions, position))
        if tensor is None or record == len(tensor) or tensor.index.positions[record] != position:
            continue
        if not tensor.index.delta or step.past_length != rows:
            return None
        rows += tensor.index.record_shape(record)[CACHE_AXIS]
    return dump


def _measure_whole(
    left: _Side,
    right: _Side,
    first: int,
    second: int,
    elementwise: tuple[float, float] | None,
    whole: Dump,
) -> NDArray[Any]:
    """Measure a whole cache and the one that a delta's rows so far make."""
    pieces = []
    for side, record in ((left, first), (right, second)):
        if side.index.delta:
            step = whole.steps[side.index.positions[record]]
            array = whole.array(step.phase, step.index, side.index.name)
            pieces.append(np.ascontiguousarray(array).view(side.dtype).reshape(1, -1))
        else:
            elements = prod(side.index.record_shape(record))
            block = side.block(int(side.index.offsets[record]), elements)
            side.check_rows(np.array([record]), block[None])
            pieces.append(block[None])
    return measure(*_numbers(left, right, *pieces), elementwise, left.scratch)
