"""The numbers of a comparison, a block of elements at a time.

`measure` takes rows of elements, one row per record, and gives one row of `STATS` for each;
`merge` joins those of two blocks. Sums of squares make SQNR and cosine, so nothing but these rows
is kept between blocks.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump.format import DTYPES, as_values

# Over the elements that are finite in both: `finite` of `count`. Positions (`*_at`) count elements
# from the start of the record. `outside` elements are beyond the elementwise tolerance; of the
# NaN and infinite ones `unmatched` stand against something else.
STATS = np.dtype(
    [
        ("count", "i8"),
        ("finite", "i8"),
        ("max_abs", "f8"),
        ("max_abs_at", "i8"),
        ("reference_there", "f8"),
        ("candidate_there", "f8"),
        ("sum_abs", "f8"),
        ("max_rel", "f8"),
        ("max_rel_at", "i8"),
        ("sum_rel", "f8"),
        ("nonzero", "i8"),
        ("peak", "f8"),
        ("signal", "f8"),
        ("power", "f8"),
        ("noise", "f8"),
        ("outside", "i8"),
        ("unmatched", "i8"),
        ("unmatched_at", "i8"),
        ("reference_nan", "i8"),
        ("candidate_nan", "i8"),
        ("reference_inf", "i8"),
        ("candidate_inf", "i8"),
    ]
)
_SUMS = (
    "count", "finite", "sum_abs", "sum_rel", "nonzero", "signal", "power", "noise", "outside",
    "unmatched", "reference_nan", "candidate_nan", "reference_inf", "candidate_inf",
)  # fmt: skip

# Up to here the squares of a block can be summed in float32.
_SQUARABLE = 1e16


class Scratch:
    """Arrays used again for every block: fresh ones cost more, in page faults, than the sums."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialized array, which the next ``take`` of ``slot`` overwrites."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot] = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


@cache
def _float8_table(dtype: str) -> NDArray[np.float32]:
    return as_values(np.arange(256, dtype=np.uint8), dtype).astype(np.float32)


def to_numbers(
    stored: NDArray[Any], dtype: str, wide: bool, scratch: Scratch, slot: str
) -> NDArray[Any]:
    """Return stored elements as numbers to reckon with.

    Args:
        stored: As on disk, of any shape.
        dtype: Their true dtype.
        wide: float64 rather than float32; integers stay integers either way.
        scratch: Where the result may live.
        slot: Of ``scratch``.
    """
    if dtype == "bfloat16":
        bits = scratch.take(slot + " bits", stored.shape, np.dtype(np.uint32))
        np.left_shift(stored, 16, out=bits, dtype=np.uint32)
        values: NDArray[Any] = bits.view(np.float32)
    elif dtype.startswith("float8"):
        values = _float8_table(dtype)[stored]
    else:
        values = stored
    if not DTYPES[dtype].inexact:
        return values
    wanted = np.dtype(np.float64 if wide else np.float32)
    if values.dtype == wanted:
        return values
    numbers = scratch.take(slot, values.shape, wanted)
    numbers[...] = values
    return numbers


def measure(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    elementwise: tuple[float, float] | None,
    scratch: Scratch,
) -> NDArray[Any]:
    """Compare rows of elements.

    Args:
        reference: [rows, elements], from `to_numbers`.
        candidate: The same shape; float when the reference is.
        elementwise: ``(atol, rtol)``, or None not to count the elements outside.
        scratch: For what is needed in between; not the slots that hold the arguments.

    Returns:
        [rows] of `STATS`.
    """
    stats = np.zeros(reference.shape[0], STATS)
    stats["count"] = stats["finite"] = reference.shape[1]
    stats["unmatched_at"] = -1
    if reference.shape[1] == 0:
        return stats
    if reference.dtype.kind != "f":
        return _measure_integers(stats, reference, candidate, elementwise, scratch)
    with np.errstate(over="ignore", invalid="ignore"):
        stats["signal"] = np.vecdot(reference, reference)
        stats["power"] = np.vecdot(candidate, candidate)
    # A NaN or an infinity reaches the sum of squares; so does a magnitude whose square overflows.
    plain = np.isfinite(stats["signal"]) & np.isfinite(stats["power"])
    if plain.all():
        _measure_finite(stats, reference, candidate, elementwise, scratch)
        return stats
    for row in np.flatnonzero(~plain):
        stats[row] = _measure_mixed(reference[row], candidate[row], elementwise, scratch)
    if plain.any():
        some = stats[plain]
        _measure_finite(some, reference[plain], candidate[plain], elementwise, scratch)
        stats[plain] = some
    return stats


def _measure_finite(
    stats: NDArray[Any],
    reference: NDArray[Any],
    candidate: NDArray[Any],
    elementwise: tuple[float, float] | None,
    scratch: Scratch,
) -> None:
    """Fill in ``stats`` (sums of squares apart) of rows that hold neither NaN nor infinity."""
    shape, kind = reference.shape, reference.dtype
    magnitude = np.abs(reference, out=scratch.take("magnitude", shape, kind))
    stats["peak"] = magnitude.max(axis=1)
    rows = np.arange(len(stats))
    if np.array_equal(reference, candidate):
        stats["reference_there"] = reference[:, 0]
        stats["candidate_there"] = candidate[:, 0]
        stats["nonzero"] = np.count_nonzero(magnitude, axis=1)
        return
    error = np.subtract(reference, candidate, out=scratch.take("error", shape, kind))
    stats["noise"] = np.vecdot(error, error)
    np.abs(error, out=error)
    worst = error.argmax(axis=1)
    stats["max_abs_at"] = worst
    stats["max_abs"] = error[rows, worst]
    stats["reference_there"] = reference[rows, worst]
    stats["candidate_there"] = candidate[rows, worst]
    stats["sum_abs"] = error.sum(axis=1, dtype=np.float64 if error.shape[1] < 64 else None)
    if elementwise is not None and stats["max_abs"].max() > elementwise[0]:
        bound = scratch.take("bound", shape, kind)
        np.multiply(magnitude, kind.type(elementwise[1]), out=bound)
        bound += kind.type(elementwise[0])
        beyond = np.greater(error, bound, out=scratch.take("beyond", shape, np.dtype(bool)))
        stats["outside"] = np.count_nonzero(beyond, axis=1)
    if magnitude.all():
        stats["nonzero"] = reference.shape[1]
        with np.errstate(over="ignore"):
            np.divide(error, magnitude, out=error)
    else:
        # The relative error is not defined where the reference is zero.
        known = np.greater(magnitude, 0, out=scratch.take("beyond", shape, np.dtype(bool)))
        stats["nonzero"] = np.count_nonzero(known, axis=1)
        with np.errstate(over="ignore"):
            np.divide(error, magnitude, out=error, where=known)
        error *= known
    worst = error.argmax(axis=1)
    stats["max_rel_at"] = worst
    stats["max_rel"] = error[rows, worst]
    stats["sum_rel"] = error.sum(axis=1)


def _measure_mixed(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    elementwise: tuple[float, float] | None,
    scratch: Scratch,
) -> NDArray[Any]:
    """Return the statistics of one row that may hold NaN and infinities, each counted apart."""
    finite = np.isfinite(reference) & np.isfinite(candidate)
    stats = np.zeros(1, STATS)
    stats["unmatched_at"] = -1
    places = np.flatnonzero(finite)
    if len(places):
        left, right = reference[places][None], candidate[places][None]
        if max(np.abs(left).max(), np.abs(right).max()) > _SQUARABLE:
            left, right = left.astype(np.float64), right.astype(np.float64)
        with np.errstate(over="ignore"):
            stats["signal"], stats["power"] = np.vecdot(left, left), np.vecdot(right, right)
            _measure_finite(stats, left, right, elementwise, scratch)
        stats["max_abs_at"] = places[stats["max_abs_at"]]
        stats["max_rel_at"] = places[stats["max_rel_at"]]
    both_nan = np.isnan(reference) & np.isnan(candidate)
    unmatched = ~finite & ~both_nan & (reference != candidate)
    stats["count"] = len(reference)
    stats["finite"] = len(places)
    stats["unmatched"] = np.count_nonzero(unmatched)
    if unmatched.any():
        stats["unmatched_at"] = unmatched.argmax()
    stats["reference_nan"] = np.count_nonzero(np.isnan(reference))
    stats["candidate_nan"] = np.count_nonzero(np.isnan(candidate))
    stats["reference_inf"] = np.count_nonzero(np.isinf(reference))
    stats["candidate_inf"] = np.count_nonzero(np.isinf(candidate))
    return stats[0]  # type: ignore[no-any-return]


def _measure_integers(
    stats: NDArray[Any],
    reference: NDArray[Any],
    candidate: NDArray[Any],
    elementwise: tuple[float, float] | None,
    scratch: Scratch,
) -> NDArray[Any]:
    differs = reference != candidate  # exact, also beyond the 53 bits of float64
    first, second = reference.astype(np.float64), candidate.astype(np.float64)
    stats["signal"], stats["power"] = np.vecdot(first, first), np.vecdot(second, second)
    _measure_finite(stats, first, second, elementwise, scratch)
    if elementwise == (0.0, 0.0):
        stats["outside"] = np.count_nonzero(differs, axis=1)
    return stats


def merge(total: NDArray[Any], block: NDArray[Any], offset: int = 0) -> None:
    """Add the statistics of ``block`` to ``total``, both one row of `STATS`, in place.

    Args:
        total: Of the elements before.
        block: Of the elements that follow.
        offset: How many elements of the record precede the block's.
    """
    if block["max_abs"] > total["max_abs"] or total["finite"] == 0:
        for key in ("max_abs", "reference_there", "candidate_there"):
            total[key] = block[key]
        total["max_abs_at"] = block["max_abs_at"] + offset
    if block["max_rel"] > total["max_rel"] or total["finite"] == 0:
        total["max_rel"] = block["max_rel"]
        total["max_rel_at"] = block["max_rel_at"] + offset
    if total["unmatched"] == 0 and block["unmatched"]:
        total["unmatched_at"] = block["unmatched_at"] + offset
    total["peak"] = max(total["peak"], block["peak"])
    for key in _SUMS:
        total[key] += block[key]


def join(rows: NDArray[Any], worst: Any) -> Any:
    """Return one row of `STATS` for many records: sums over all, the largest errors of ``worst``.

    Args:
        rows: [records] of `STATS`.
        worst: The row whose errors and their positions are kept.
    """
    total = worst.copy()
    for key in _SUMS:
        total[key] = rows[key].sum(axis=0)
    total["peak"] = rows["peak"].max()
    return total


def sqnr_db(stats: NDArray[Any]) -> NDArray[np.float64]:
    """Return ``10 log10(sum(reference²) / sum(error²))``: infinite where there is no error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(stats["signal"] / stats["noise"])
    return np.where(stats["noise"] == 0, np.inf, ratio)


def relative_peak(stats: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest absolute error over the reference's largest magnitude.

    Infinite where the reference is all zero and the candidate is not, and where a NaN or an
    infinity stands against something else.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = stats["max_abs"] / stats["peak"]
    share = np.where(stats["max_abs"] == 0, 0.0, share)
    return np.where(stats["unmatched"] > 0, np.inf, share)


def cosine(stats: Any) -> float:
    """Return the cosine similarity of one row: 1 for two all-zero tensors.

    ``1 - (noise - (|r| - |c|)²) / (2 |r| |c|)``: the sums of squares nearly cancel when the
    tensors are alike, and this form keeps the digits that matter then.
    """
    left, right = math.sqrt(stats["signal"]), math.sqrt(stats["power"])
    if left == 0 or right == 0:
        return 1.0 if left == right else 0.0
    if not math.isfinite(left * right):
        return math.nan
    apart = (float(stats["noise"]) - (left - right) ** 2) / (2 * left * right)
    return max(-1.0, min(1.0, 1.0 - max(apart, 0.0)))
