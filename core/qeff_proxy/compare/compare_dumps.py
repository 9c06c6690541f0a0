"""Compare two dumps, in these stages.

1. `pair_dumps` (pairing): which record stands against which.
2. `measure_pair` (streaming): run through the files in blocks.
3. `judge`: compare the numbers of each step with the tensor's tolerance.
4. `_find_first`: the first step, and in it the first tensor, that failed; and that differs at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.messages import counted
from qeff_proxy.compare.pairing import pair_dumps
from qeff_proxy.compare.results import Comparison, Divergence, PairStats, TensorComparison
from qeff_proxy.compare.statistics import STATS, cosine, join, relative_peak, sqnr_db
from qeff_proxy.compare.streaming import delta_with_all_rows, measure_pair, shapes_agree
from qeff_proxy.compare.tolerances import COMPUTED_IN, Tolerances
from qeff_proxy.dump import Dump, StepInfo, read_dump
from qeff_proxy.dump.format import DTYPES
from qeff_proxy.errors import DumpError

if TYPE_CHECKING:
    from qeff_proxy.compare.pairing import Pair, Pairing
    from qeff_proxy.compare.tolerances import NoiseFloor, Tolerance

MAX_WORKERS = 4


def compare_dumps(
    reference: Dump | str | PathLike[str],
    candidate: Dump | str | PathLike[str],
    *,
    tolerances: Tolerances | None = None,
    tensors: Sequence[str] = ("*",),
    partial: bool = False,
) -> Comparison:
    """Hold every tensor of ``candidate`` against the one of ``reference``.

    Args:
        reference: A dump or its folder.
        candidate: A dump or its folder.
        tolerances: How far each tensor may be off; by dtype unless given.
        tensors: Globs over tensor names; others are not compared.
        partial: Compare what both dumps have; otherwise a step or tensor of the reference that
            the candidate lacks, or the other way round, makes the comparison fail.

    Raises:
        DumpError: A dump is damaged or incomplete, or the two have no tensor in common.
        UsageError: A tolerance is for no tensor that is compared.
    """
    one = reference if isinstance(reference, Dump) else read_dump(reference)
    two = candidate if isinstance(candidate, Dump) else read_dump(candidate)
    pairing = pair_dumps(one, two, tensors)
    if not pairing.pairs:
        raise DumpError(_nothing_in_common(one, two))
    limits = tolerances if tolerances is not None else Tolerances()
    precision = two.provenance.get("precision") if limits.precision is None else None
    if precision in COMPUTED_IN:
        limits = replace(limits, precision=precision)
    limits.check_used(dict.fromkeys(str(pair.name) for pair in pairing.pairs))
    # Tensors are independent: while one waits for the disk, another is reckoned with.
    executor = ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1))
    try:
        futures = [
            executor.submit(_compare_pair, pair, order, limits, pairing.steps, one, two)
            for order, pair in enumerate(pairing.pairs)
        ]
        results = [future.result() for future in futures]
    finally:
        executor.shutdown(cancel_futures=True)
    missing = _missing(pairing)
    notes = _provenance_notes(one, two)
    if precision in COMPUTED_IN:
        notes.append(f"the candidate computes in {precision}: limits {COMPUTED_IN[precision]}")
    return Comparison(
        reference=one.folder,
        candidate=two.folder,
        reference_provenance=one.provenance,
        candidate_provenance=two.provenance,
        steps=pairing.steps,
        tensors=results,
        first_divergence=_find_first(results, pairing.steps, lambda t: ~t.step_passed),
        first_difference=_find_first(results, pairing.steps, lambda t: t.step_error != 0),
        problems=[] if partial else missing,
        notes=notes + missing if partial else notes,
    )


def _nothing_in_common(one: Dump, two: Dump) -> str:
    def describe(dump: Dump) -> str:
        steps = ", ".join(step.label for step in dump.steps[:2])
        held = counted(len(dump.steps), "step")
        return f"{dump.folder} has {held} ({steps}…) and {dump.names()[:2]}…"

    return f"nothing to compare: {describe(one)}; {describe(two)}"


def _missing(pairing: Pairing) -> list[str]:
    found = []
    for whose, steps, tensors in (
        ("reference", pairing.reference_steps, pairing.reference_tensors),
        ("candidate", pairing.candidate_steps, pairing.candidate_tensors),
    ):
        if steps:
            labels = ", ".join(step.label for step in steps[:3])
            found.append(
                f"only the {whose} has {counted(len(steps), 'step')} ({_cut(labels, len(steps))})"
            )
        if tensors:
            names = ", ".join(tensors[:3])
            found.append(
                f"only the {whose} has {counted(len(tensors), 'tensor')} "
                f"({_cut(names, len(tensors))})"
            )
    return found


def _cut(text: str, count: int) -> str:
    return text + (", …" if count > 3 else "")


def _provenance_notes(one: Dump, two: Dump) -> list[str]:
    notes = []
    for key in ("model", "prompt", "seed"):
        first, second = one.provenance.get(key), two.provenance.get(key)
        if key in one.provenance and key in two.provenance and first != second:
            notes.append(f"the dumps are of different {key}s: {first!r} and {second!r}")
    device = two.provenance.get("device")
    cache = device.get("cache") if isinstance(device, dict) else None
    if cache == "reference":
        notes.append("each step of the candidate was fed the reference's cache: errors of one step")
    if cache == "device":
        notes.append("the candidate carried its own cache: errors add up from step to step")
    return notes


def _compare_pair(
    pair: Pair, order: int, limits: Tolerances, steps: list[StepInfo], one: Dump, two: Dump
) -> TensorComparison:
    left, right = pair.reference.index, pair.candidate.index
    tolerance = limits.of(str(pair.name), left.dtype, right.dtype, pair.phase)
    floor = limits.floors.get((pair.phase, str(pair.name)))
    comparable, problem = _comparable(pair, steps, one, two)
    rows = np.zeros(len(pair.steps), STATS)
    usable = np.flatnonzero(comparable)
    for chosen, stats in measure_pair(pair, usable, tolerance.elementwise, one, two):
        rows[chosen] = stats
    passed = judge(rows, tolerance) & comparable
    failed = np.flatnonzero(~passed & comparable)

    whole = delta_with_all_rows(pair, one, two) is not None

    def describe(row: Any, record: int) -> PairStats:
        shape = _measured_shape(pair, record, whole=whole)
        return PairStats.of(row, steps[pair.steps[record]].label, shape)

    first_failure = describe(rows[failed[0]], int(failed[0])) if len(failed) else None
    worst = None
    if len(usable):
        shown = failed if len(failed) else usable  # a large error of a step that passes is none
        at = int(shown[np.argmax(np.where(rows["unmatched"], np.inf, rows["max_abs"])[shown])])
        worst = describe(join(rows[usable], rows[at]), at)
    return TensorComparison(
        name=pair.name,
        phase=pair.phase,
        order=order,
        reference_dtype=left.dtype,
        candidate_dtype=right.dtype,
        shape=left.record_shape(int(pair.reference_records[0])),
        tolerance=tolerance,
        steps=pair.steps,
        step_passed=passed,
        step_error=np.where(comparable, relative_peak(rows), np.inf),
        step_sqnr=np.where(comparable, sqnr_db(rows), np.nan),
        worst=worst,
        first_failure=first_failure,
        problem=problem,
        why=problem or (_explain(first_failure, tolerance, floor) if first_failure else ""),
        floor=floor,
    )


def _measured_shape(pair: Pair, record: int, *, whole: bool) -> tuple[int, ...]:
    """The shape that indices of a record are in: the delta's, unless whole caches were compared."""
    left = pair.reference.index.record_shape(int(pair.reference_records[record]))
    right = pair.candidate.index.record_shape(int(pair.candidate_records[record]))
    return right if pair.candidate.index.delta != whole else left


def _comparable(
    pair: Pair, steps: list[StepInfo], one: Dump, two: Dump
) -> tuple[NDArray[np.bool_], str | None]:
    """Return which common records can be measured, and why others cannot."""
    left, right = pair.reference.index, pair.candidate.index
    count = len(pair.steps)
    if DTYPES[left.dtype].inexact != DTYPES[right.dtype].inexact:
        return np.zeros(count, bool), f"dtypes differ: {left.dtype} against {right.dtype}"
    if left.shape is not None and left.shape == right.shape and not (left.delta or right.delta):
        return np.ones(count, bool), None
    agree = np.array(
        [
            shapes_agree(pair, int(a), int(b), one.steps, two.steps)
            for a, b in zip(pair.reference_records, pair.candidate_records, strict=True)
        ],
        bool,
    )
    if agree.all():
        return agree, None
    bad = int(agree.argmin())
    first = left.record_shape(int(pair.reference_records[bad]))
    second = right.record_shape(int(pair.candidate_records[bad]))
    label = steps[pair.steps[bad]].label
    return agree, f"shapes differ in {label}: {list(first)} against {list(second)}"


def judge(rows: NDArray[Any], tolerance: Tolerance) -> NDArray[np.bool_]:
    """Whether each row of `STATS` is within a tolerance."""
    passed = rows["unmatched"] == 0
    if tolerance.elementwise is not None:
        within = rows["outside"] == 0
        if tolerance.rounding is not None:
            within |= (relative_peak(rows) <= tolerance.rounding) & (
                sqnr_db(rows) >= -20 * math.log10(tolerance.rounding)
            )
        passed &= within
    if tolerance.peak is not None:
        passed &= relative_peak(rows) <= tolerance.peak
    if tolerance.sqnr is not None:
        passed &= sqnr_db(rows) >= tolerance.sqnr
    if tolerance.cosine is not None:
        passed &= np.array([cosine(row) >= tolerance.cosine for row in rows], bool)
    return passed  # type: ignore[no-any-return]


def _explain(stats: PairStats, tolerance: Tolerance, floor: NoiseFloor | None) -> str:
    """Say why a step failed."""
    rounding = "" if floor is None else f"; PyTorch in that precision: {floor.sqnr:.1f} dB"
    if stats.unmatched:
        return (
            f"{counted(stats.unmatched, 'NaN or infinite element')} against others, first at "
            f"{list(stats.unmatched_at or ())} in {stats.step}"
        )
    return (
        f"{stats.step}: max error {stats.max_abs:.3g} at {list(stats.max_abs_at)} "
        f"({stats.reference_there:.6g} became {stats.candidate_there:.6g}), "
        f"{stats.outside} of {counted(stats.count, 'element')} outside {tolerance}"
        if tolerance.elementwise is not None
        else f"{stats.step}: max error {stats.max_abs:.3g} at {list(stats.max_abs_at)} over a "
        f"peak of {stats.peak:.3g}, SQNR {stats.sqnr:.1f} dB, cosine {stats.cosine:.6f}; "
        f"limit {tolerance}{rounding}"
    )


def _find_first(
    results: list[TensorComparison],
    steps: list[StepInfo],
    wrong: Callable[[TensorComparison], NDArray[np.bool_]],
) -> Divergence | None:
    """Find the first tensor of the first step of which ``wrong`` says so (one value a step)."""
    found = [
        (int(r.steps[np.argmax(marks)]), r.order, int(np.argmax(marks)), r)
        for r, marks in ((r, wrong(r)) for r in results)
        if marks.any()
    ]
    if not found:
        return None
    position, order, at, first = min(found, key=lambda item: item[:2])
    here = [
        (r, float(r.step_error[np.searchsorted(r.steps, position)]))
        for r in results
        if position in r.steps
    ]
    before = [r for r, _ in here if r.order < order]
    return Divergence(
        step=steps[position].label,
        tensor=str(first.name),
        layer=first.name.layer,
        before=str(before[-1].name) if before else None,
        is_input=first.name.direction == "in",
        error=float(first.step_error[at]),
        growth=_growth(first, here),
    )


def _growth(
    first: TensorComparison, here: list[tuple[TensorComparison, float]]
) -> list[tuple[str, float]]:
    """Return the largest error of each layer from ``first`` on, then of what comes after them."""
    grown: dict[str, float] = {}
    for result, error in here:
        name = result.name
        if name.direction == "in" or result.order < first.order:
            continue
        if name.layer is not None and name.part == first.name.part:
            key = f"layer {name.layer}"
        elif name.layer is None:
            key = f"{name.part}.{name.direction}.{name.tensor}"
        else:
            continue
        grown[key] = max(grown.get(key, 0.0), error)
    return list(grown.items())
