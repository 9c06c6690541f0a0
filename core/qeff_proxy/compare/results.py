"""What a comparison found, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.common.shown import Shown
from qeff_proxy.compare.statistics import cosine, sqnr_db
from qeff_proxy.dump import StepInfo, TensorName
from qeff_proxy.dump.format import Phase

if TYPE_CHECKING:
    from qeff_proxy.compare.tolerances import NoiseFloor, Tolerance


@dataclass(frozen=True)
class PairStats:
    """The differences of one tensor in one step (or, joined, in all steps).

    Errors are over the elements that are finite in both; relative errors over those whose
    reference is not zero.

    Attributes:
        step: Where the largest absolute error is: ``decode-0003``.
        count: Elements.
        max_abs: Largest absolute error.
        max_abs_at: Index of that element.
        reference_there: The reference's value there.
        candidate_there: The candidate's value there.
        mean_abs: Mean absolute error.
        max_rel: Largest relative error.
        max_rel_at: Index of that element.
        mean_rel: Mean relative error.
        cosine: Cosine similarity.
        sqnr: Signal-to-quantization-noise ratio in dB; infinite without error.
        peak: Largest magnitude of the reference.
        outside: Elements beyond the elementwise tolerance.
        unmatched: NaN and infinite elements that the other dump does not have at that place.
        unmatched_at: Index of the first of them, or None.
        reference_nan: NaN elements of the reference.
        candidate_nan: NaN elements of the candidate.
        reference_inf: Infinite elements of the reference.
        candidate_inf: Infinite elements of the candidate.
    """

    step: str
    count: int
    max_abs: float
    max_abs_at: tuple[int, ...]
    reference_there: float
    candidate_there: float
    mean_abs: float
    max_rel: float
    max_rel_at: tuple[int, ...]
    mean_rel: float
    cosine: float
    sqnr: float
    peak: float
    outside: int
    unmatched: int
    unmatched_at: tuple[int, ...] | None
    reference_nan: int
    candidate_nan: int
    reference_inf: int
    candidate_inf: int

    @classmethod
    def of(cls, row: Any, step: str, shape: tuple[int, ...]) -> PairStats:
        """Make it from one row of `STATS` of a tensor of ``shape``."""
        return cls(
            step=step,
            count=int(row["count"]),
            max_abs=float(row["max_abs"]),
            max_abs_at=_index(row["max_abs_at"], shape),
            reference_there=float(row["reference_there"]),
            candidate_there=float(row["candidate_there"]),
            mean_abs=float(row["sum_abs"]) / max(int(row["finite"]), 1),
            max_rel=float(row["max_rel"]),
            max_rel_at=_index(row["max_rel_at"], shape),
            mean_rel=float(row["sum_rel"]) / max(int(row["nonzero"]), 1),
            cosine=cosine(row),
            sqnr=float(sqnr_db(row)),
            peak=float(row["peak"]),
            outside=int(row["outside"]),
            unmatched=int(row["unmatched"]),
            unmatched_at=_index(row["unmatched_at"], shape) if row["unmatched"] else None,
            reference_nan=int(row["reference_nan"]),
            candidate_nan=int(row["candidate_nan"]),
            reference_inf=int(row["reference_inf"]),
            candidate_inf=int(row["candidate_inf"]),
        )


def _index(flat: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) == 0:
        return ()
    return tuple(int(n) for n in np.unravel_index(int(flat), shape))


@dataclass(frozen=True)
class TensorComparison:
    """One tensor of one phase in both dumps.

    Attributes:
        name: Of the tensor.
        phase: Of its records.
        order: Its place in the order of computation within a step.
        reference_dtype: Its true dtype in the reference.
        candidate_dtype: Its true dtype in the candidate.
        shape: Of its first common record in the reference.
        tolerance: The limits that its errors were compared with.
        steps: Positions of the steps that were compared, in `Comparison.steps`.
        step_passed: For each of them, whether it passed (bool).
        step_error: For each of them, the largest error over the reference's peak (float64);
            infinite where the step could not be compared.
        step_sqnr: For each of them, the SQNR in dB (float64).
        worst: The step with the largest error, of those that failed if any did, whose largest
            errors these are; counts, means, cosine and SQNR are over all steps. None when nothing
            could be measured.
        first_failure: Of the first step that failed; None when it passed or could not be measured.
        problem: Why some steps could not be measured (shapes, dtypes), or None.
        why: Why it failed, in words; empty when it passed.
        floor: The error of PyTorch in the candidate's precision, where that was measured.
    """

    name: TensorName
    phase: Phase
    order: int
    reference_dtype: str
    candidate_dtype: str
    shape: tuple[int, ...]
    tolerance: Tolerance
    steps: NDArray[np.int64]
    step_passed: NDArray[np.bool_]
    step_error: NDArray[np.float64]
    step_sqnr: NDArray[np.float64]
    worst: PairStats | None
    first_failure: PairStats | None
    problem: str | None
    why: str
    floor: NoiseFloor | None = None

    @property
    def passed(self) -> bool:
        """Whether every step passed."""
        return bool(self.step_passed.all())

    def to_json(self, steps: list[StepInfo]) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": str(self.name),
            "phase": self.phase,
            "part": self.name.part,
            "direction": self.name.direction,
            "tensor": self.name.tensor,
            "layer": self.name.layer,
            "reference_dtype": self.reference_dtype,
            "candidate_dtype": self.candidate_dtype,
            "shape": list(self.shape),
            "tolerance": str(self.tolerance),
            "floor": plain_json(self.floor),
            "passed": self.passed,
            "why": self.why,
            "problem": self.problem,
            "steps_compared": len(self.steps),
            "steps_failed": int((~self.step_passed).sum()),
            "worst": plain_json(self.worst),
            "first_failure": plain_json(self.first_failure),
            "by_step": {
                "step": [steps[p].label for p in self.steps],
                "passed": self.step_passed.tolist(),
                "error_over_peak": plain_json(self.step_error.tolist()),
                "sqnr": plain_json(self.step_sqnr.tolist()),
            },
        }


@dataclass(frozen=True)
class Divergence:
    """Where the two runs first diverge, and how the error grows from there.

    Attributes:
        step: The first step with a tensor that failed (or, of a difference, that differs).
        tensor: The first such tensor in the order of computation.
        layer: Its layer, or None.
        before: The last tensor in that order that passed, or None.
        is_input: It is an input: the runs were given different things.
        error: Its largest error over the reference's peak.
        growth: (what, error over peak) for each later layer of the part in that step, and then
            what comes after all layers.
    """

    step: str
    tensor: str
    layer: int | None
    before: str | None
    is_input: bool
    error: float
    growth: list[tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = plain_json(self)
        return {
            **value,
            "growth": [{"at": at, "error_over_peak": error} for at, error in value["growth"]],
        }


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Two dumps compared.

    Attributes:
        reference: Folder of the reference.
        candidate: Folder of the candidate.
        reference_provenance: What made the reference.
        candidate_provenance: What made the candidate.
        steps: Those in both.
        tensors: In the order of the computation.
        first_divergence: Where a tensor is first out of its tolerance; None when all passed.
        first_difference: Where a tensor first differs at all; None when all are equal.
        problems: Why the comparison fails whatever the numbers say.
        notes: What does not make it fail but should be known.
    """

    reference: Path
    candidate: Path
    reference_provenance: dict[str, Any]
    candidate_provenance: dict[str, Any]
    steps: list[StepInfo]
    tensors: list[TensorComparison]
    first_divergence: Divergence | None
    first_difference: Divergence | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def origin(self) -> Divergence | None:
        """Where the runs diverge within tolerance, before the first divergence if there is one.

        None unless equality before it says that it is more than rounding: both runs are of one
        backend with one set of options, or a layer or a step before it is equal.
        """
        first, diverged = self.first_difference, self.first_divergence
        if first is None or first.is_input:
            return None
        if diverged is not None and (first.step, first.tensor) == (diverged.step, diverged.tensor):
            return None
        one, two = (
            (made.get("backend"), made.get("options"))
            for made in (self.reference_provenance, self.candidate_provenance)
        )
        if (one == two and one[0] is not None) or first.step != self.steps[0].label:
            return first
        names = [tensor.name for tensor in sorted(self.tensors, key=lambda t: t.order)]
        before = names[: [str(name) for name in names].index(first.tensor)]
        others = [n for n in before if n.direction == "out" and n.layer not in (None, first.layer)]
        return first if others else None

    @property
    def passed(self) -> bool:
        """Whether something was compared, all of it passed, and nothing is missing."""
        return bool(self.tensors) and not self.problems and all(t.passed for t in self.tensors)

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        first = self.first_divergence
        return {
            "verdict": "PASSED" if self.passed else "FAILED",
            "first divergence": None if first is None else f"{first.tensor} in {first.step}",
            "tensors": len(self.tensors),
            "steps": len(self.steps),
            "problems": "; ".join(self.problems) or None,
            "reference": self.reference,
            "candidate": self.candidate,
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: infinite and undefined numbers are None."""
        return {
            "passed": self.passed,
            "reference": str(self.reference),
            "candidate": str(self.candidate),
            "reference_provenance": self.reference_provenance,
            "candidate_provenance": self.candidate_provenance,
            "problems": self.problems,
            "notes": self.notes,
            "first_divergence": (
                self.first_divergence.to_json() if self.first_divergence else None
            ),
            "first_difference": (
                self.first_difference.to_json() if self.first_difference else None
            ),
            "steps": [step.label for step in self.steps],
            "tensors": [tensor.to_json(self.steps) for tensor in self.tensors],
        }
