"""Which record of the candidate is compared with which of the reference, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump import Dump, StepInfo, StoredTensor, TensorName
from qeff_proxy.dump.format import Phase
from qeff_proxy.dump.selection import matches_any

_AFTER_ALL_LAYERS = 1_000_000


@dataclass(frozen=True)
class Pair:
    """Two files that hold the same tensor of the same phase.

    Attributes:
        name: Of the tensor.
        phase: Of all its records.
        reference: Its records in the reference.
        candidate: Its records in the candidate.
        steps: Of each common record: the position of its step among the common steps (int64).
        reference_records: Of each common record: its number in the reference's file (int64).
        candidate_records: Of each common record: its number in the candidate's file (int64).
    """

    name: TensorName
    phase: Phase
    reference: StoredTensor
    candidate: StoredTensor
    steps: NDArray[np.int64]
    reference_records: NDArray[np.int64]
    candidate_records: NDArray[np.int64]


@dataclass(frozen=True)
class Pairing:
    """Two dumps held side by side.

    Attributes:
        pairs: In the order of the computation: parts as they ran, inputs first, then by layer,
            what belongs to no layer last.
        steps: In both dumps, in the reference's order.
        reference_steps: Only in the reference.
        candidate_steps: Only in the candidate.
        reference_tensors: Phase and name, only in the reference.
        candidate_tensors: Phase and name, only in the candidate.
    """

    pairs: list[Pair]
    steps: list[StepInfo]
    reference_steps: list[StepInfo]
    candidate_steps: list[StepInfo]
    reference_tensors: list[str]
    candidate_tensors: list[str]


def _depth(name: TensorName, parts: Sequence[str]) -> tuple[int, int, int, int]:
    """Return what sorts tensors of one step into the order in which they were computed."""
    part = parts.index(name.part)
    if name.direction == "in":
        return part, 0, -1 if name.layer is None else name.layer, 0
    within = 0
    if name.tensor.startswith("hidden_states"):
        # Within a layer: the cache rows, then what attention gives, the MLP, the whole layer.
        within = 1 if "attention" in name.tensor else 2 if "mlp" in name.tensor else 3
    return part, 1, _AFTER_ALL_LAYERS if name.layer is None else name.layer, within


def pair_dumps(reference: Dump, candidate: Dump, globs: Sequence[str]) -> Pairing:
    """Pair the records of two dumps by step, part, direction, tensor and layer.

    Args:
        reference: What the candidate is compared with.
        candidate: The other.
        globs: Over tensor names; others are left out on both sides.
    """
    candidate_positions = {(s.phase, s.index): i for i, s in enumerate(candidate.steps)}
    reference_keys = {(s.phase, s.index) for s in reference.steps}
    common = [s for s in reference.steps if (s.phase, s.index) in candidate_positions]
    order = {(s.phase, s.index): i for i, s in enumerate(common)}
    in_reference = np.array([order.get((s.phase, s.index), -1) for s in reference.steps], np.int64)
    in_candidate = np.array([order.get((s.phase, s.index), -1) for s in candidate.steps], np.int64)
    parts = reference.manifest.parts

    chosen = {key: t for key, t in reference.tensors.items() if matches_any(str(key[1]), globs)}
    other = {key: t for key, t in candidate.tensors.items() if matches_any(str(key[1]), globs)}
    pairs: list[Pair] = []
    lonely: tuple[list[str], list[str]] = ([], [])
    for (phase, name), tensor in chosen.items():
        against = other.get((phase, name))
        if against is None:
            continue
        steps, left, right = np.intersect1d(
            _known(in_reference[tensor.index.positions], 0),
            _known(in_candidate[against.index.positions], 1),
            return_indices=True,
        )
        if (steps < 0).any():
            left, right, steps = left[steps >= 0], right[steps >= 0], steps[steps >= 0]
        for side, known in enumerate(
            (in_reference[tensor.index.positions], in_candidate[against.index.positions])
        ):
            if missing := int(np.count_nonzero(known >= 0)) - len(steps):
                lonely[side].append(f"{phase}/{name} in {missing} steps")
        if len(steps):
            pairs.append(Pair(name, phase, tensor, against, steps, left, right))
    pairs.sort(key=lambda pair: _depth(pair.name, parts))
    return Pairing(
        pairs=pairs,
        steps=common,
        reference_steps=[s for s in reference.steps if (s.phase, s.index) not in order],
        candidate_steps=[s for s in candidate.steps if (s.phase, s.index) not in reference_keys],
        reference_tensors=_unpaired(chosen, other, candidate) + lonely[0],
        candidate_tensors=_unpaired(other, chosen, reference) + lonely[1],
    )


def _known(steps: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Give each record of a step that is not common a number that no other record has."""
    foreign = steps < 0
    return np.where(foreign, -2 * np.arange(len(steps), dtype=np.int64) - 2 - side, steps)


def _unpaired(
    tensors: dict[tuple[Phase, TensorName], StoredTensor],
    others: dict[tuple[Phase, TensorName], StoredTensor],
    other: Dump,
) -> list[str]:
    """Name the tensors without a partner; one that the other leaves out on purpose is no loss."""
    omitted = {(o.phase, o.name) for o in other.omitted}
    phases = {step.phase for step in other.steps}
    return [
        f"{phase}/{name}"
        for phase, name in tensors
        if (phase, name) not in others and (phase, name) not in omitted and phase in phases
    ]
