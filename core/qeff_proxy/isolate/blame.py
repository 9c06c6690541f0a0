"""Which operators of a layer cause its error on a backend.

Everything is measured at the layer's outputs: some operators run on the backend, all others are
exact. So an error counts as much as it does harm, and no limit for single operators is needed,
whose rounding differs from kind to kind. `find_culprits` takes operators away from both ends of the
layer as long as at least half of its error remains (delta debugging: A. Zeller, R. Hildebrandt,
"Simplifying and isolating failure-inducing input", IEEE TSE 28, 2002). A group is left where
operators are at fault only together, such as those that a backend fuses, or where it refuses fewer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.common.quiet import without_warnings
from qeff_proxy.isolate.operators import Group, Operators, Values
from qeff_proxy.session.session import Session
from qeff_proxy.verify.results import reason_of

_LOG = logging.getLogger(__name__)

#: Opens a group on the backend.
OpenGroup = Callable[[Group], AbstractContextManager[Session]]

#: Of the error, what remains when it is still the same fault; and what is a fault of its own.
SAME, _ANOTHER = 0.5, 0.1
#: A run shows a fault that was seen before, if its error is at least this share.
SEEN = 0.25
#: So many causes in one layer are looked for.
MOST_CAUSES = 4
#: Operators inside a group are taken out one by one up to this size.
_SMALL_GROUP = 24
#: How often the culprit runs to see whether its result is the same each time.
RUNS = 5


class Trials:
    """Runs groups of a layer's operators on a backend, each once.

    Args:
        operators: The layer.
        open_group: Opens a group on the backend.
    """

    def __init__(self, operators: Operators, open_group: OpenGroup) -> None:
        self.operators = operators
        self.opened = open_group
        self._errors: dict[frozenset[int], float | None] = {}
        #: How often each group runs: more than once where the fault moves from run to run.
        self.times = 1
        #: Why the backend refused groups, by their operators.
        self.refused: dict[frozenset[int], str] = {}

    def on(self, operators: Operators) -> Trials:
        """The same for other values of the layer."""
        return Trials(operators, self.opened)

    def run(self, numbers: Iterable[int], values: Mapping[str, Array]) -> dict[str, Array]:
        """What the backend gives for some operators, by the layer's names."""
        chosen = set(numbers)
        if not chosen:
            return {}
        group = self.operators.group(chosen)
        self.operators.free_pages()
        # A backend may warn of a graph that the user never asked for.
        with without_warnings(), self.opened(group) as session:
            found = session.run({new: np.asarray(values[old]) for new, old in group.inputs.items()})
        return {old: found[new] for new, old in group.outputs.items()}

    def error(self, numbers: Iterable[int], *, again: bool = False) -> float | None:
        """The error of the layer with these operators on the backend and all others exact.

        Returns:
            The largest error of an output over its peak; ``None`` where the backend refuses them.
            That of one more run, if it runs ``again``.
        """
        chosen = frozenset(numbers)
        if again:
            return self._error(chosen)
        if chosen not in self._errors:
            errors = [self._error(chosen) for _ in range(self.times)]
            known = [error for error in errors if error is not None]
            self._errors[chosen] = max(known) if len(known) == len(errors) else None
        return self._errors[chosen]

    def repeat(self) -> None:
        """From now on, run each group several times: its error is the largest of these."""
        self.times = RUNS
        self._errors.clear()

    def _error(self, chosen: frozenset[int]) -> float | None:
        try:
            found = self.run(chosen, self.operators.values)
        except Exception as error:  # noqa: BLE001 (a backend's fault; the group is not usable)
            _LOG.debug("a group of %d operators was refused", len(chosen), exc_info=error)
            self.refused[chosen] = reason_of(error)
            return None
        return self.distance(self.operators.run_on(found, without=chosen))

    def without(self, numbers: Iterable[int], values: Mapping[str, Array]) -> dict[str, Array]:
        """The layer's outputs with these operators exact, and all others on the backend.

        Args:
            numbers: The operators that run exactly, on what those before them give.
            values: The layer's inputs.
        """
        chosen = set(numbers)
        before, after = self.operators.around(chosen)
        found = {**values, **self.run(before, values)}
        found = self.operators.run_these(chosen, found)
        return {**found, **self.run(after, found)}

    def distance(self, values: Mapping[str, Array]) -> float:
        """The largest error of a layer's output over its peak."""
        return distance(self.operators.results(self.operators.values), values)


def distance(expected: Values, actual: Values) -> float:
    """The largest error over its peak, of the tensors that are expected."""
    return max((over_peak(array, actual[name]) for name, array in expected.items()), default=0.0)


def absolute_error(reference: Array, actual: Array) -> Array:
    """The absolute error of each element, float64: 0 where both are the same, NaN too."""
    one, two = reference.astype(np.float64), actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where((one == two) | (np.isnan(one) & np.isnan(two)), 0.0, np.abs(one - two))


def peak_of(reference: Array) -> float:
    """The largest finite magnitude; 0 where there is none."""
    numbers = reference.astype(np.float64)
    return float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))


def over_peak(reference: Array, actual: Array) -> float:
    """The largest absolute error over the largest magnitude.

    It is infinite for wrong shapes, and for NaN where the other is a number.
    """
    if reference.shape != actual.shape:
        return math.inf
    if not reference.size:
        return 0.0
    if reference.dtype.kind in "biu":
        return 0.0 if np.array_equal(reference, actual) else math.inf
    peak, largest = peak_of(reference), float(absolute_error(reference, actual).max())
    if not math.isfinite(largest):
        return math.inf
    return largest / peak if peak else (math.inf if largest else 0.0)


@dataclass(frozen=True)
class Culprit:
    """Operators that cause an error.

    Attributes:
        numbers: Their places among the layer's operators.
        error: The layer's largest error over its peak with only these on the backend.
        remaining: That with all but these (and the culprits before it) on the backend; ``None``
            where the backend refuses the others.
        shown: In how many of `RUNS` runs the error showed.
        refused: Why a part of them cannot be looked at alone; ``None`` where nothing was refused.
    """

    numbers: tuple[int, ...]
    error: float
    remaining: float | None
    shown: int
    refused: str | None = None


def find_culprits(
    trials: Trials,
    passes: Callable[[Values], bool],
    progress: Callable[[str], None] = lambda _stage: None,
    *,
    most: int = MOST_CAUSES,
    seen: float = 0.0,
) -> tuple[float | None, list[Culprit]]:
    """Find the operators that cause a layer's error, or that the backend refuses.

    Args:
        trials: The layer.
        passes: Whether outputs of the layer are within tolerance, so that no cause is left.
        progress: Called with the name of each stage as it starts.
        most: How many causes to look for.
        seen: The layer's error in an earlier run; one that does not show now may come again.

    Returns:
        The layer's error with all its operators on the backend (``None``: refused so), and the
        culprits; none where there is no error to explain.
    """
    everything = list(range(len(trials.operators.nodes)))
    total = trials.error(everything)
    if total is not None and not still(total, seen, SEEN):
        trials.repeat()
        total = trials.error(everything)
    if total is None:
        progress("looking for the operator that is refused")
        numbers = _shrink(trials, everything, lambda chosen: trials.error(chosen) is None)
        why = trials.refused[frozenset(numbers)]
        shown = sum(trials.error(numbers, again=True) is None for _ in range(RUNS))
        return None, [Culprit(numbers, math.inf, _without(trials, set(numbers))[0], shown, why)]
    culprits: list[Culprit] = []
    exact: set[int] = set()
    error: float | None = total
    while error and len(culprits) < most:
        progress("looking for the operator")
        least = error

        def causes(chosen: list[int], least: float = least) -> bool:
            return still(trials.error(chosen), least, SAME)

        left = [number for number in everything if number not in exact]
        pieces = [left] if not exact else _neighbours(left)
        start = next((piece for piece in pieces if causes(piece)), None)
        if start is None:
            break
        numbers, its_error, shown = _shrink_surely(trials, start, causes)
        exact |= set(numbers)
        error, values = _without(trials, exact)
        refused = next((why for key, why in trials.refused.items() if key <= set(numbers)), None)
        culprits.append(Culprit(numbers, its_error, error, shown, refused))
        if not still(error, total, _ANOTHER) and passes(values):
            break
    return total, culprits


def _shrink_surely(
    trials: Trials, numbers: list[int], holds: Callable[[list[int]], bool]
) -> tuple[tuple[int, ...], float, int]:
    """`_shrink`, with repeated runs where results move; its error, and how often it shows."""
    found = _shrink(trials, numbers, holds)
    error = trials.error(found) or 0.0
    shown = sum(still(trials.error(found, again=True), error, _ANOTHER) for _ in range(RUNS))
    if shown < RUNS and len(found) > 1 and trials.times == 1:
        trials.repeat()
        return _shrink_surely(trials, list(found), holds)
    return found, error, shown


def still(error: float | None, whole: float, share: float) -> bool:
    """Whether an error is at least this share of another."""
    if error is None:
        return False
    return error == math.inf if whole == math.inf else error >= share * whole


def _shrink(
    trials: Trials, numbers: list[int], holds: Callable[[list[int]], bool]
) -> tuple[int, ...]:
    """The least neighbouring operators for which something still holds."""
    step = len(numbers) // 2
    while step:
        if len(numbers) > step and holds(numbers[step:]):
            numbers = numbers[step:]
        elif len(numbers) > step and holds(numbers[:-step]):
            numbers = numbers[:-step]
        else:
            step //= 2
            continue
        step = min(step, len(numbers) // 2)
    if 2 < len(numbers) <= _SMALL_GROUP:
        for number in numbers[1:-1]:
            fewer = [one for one in numbers if one != number]
            if trials.operators.is_closed(fewer) and holds(fewer):
                numbers = fewer
    return tuple(numbers)


def _neighbours(numbers: list[int]) -> list[list[int]]:
    """Runs of neighbouring operators: those on both sides of one that is exact."""
    pieces: list[list[int]] = []
    for number in numbers:
        if not pieces or number != pieces[-1][-1] + 1:
            pieces.append([])
        pieces[-1].append(number)
    return pieces


def _without(trials: Trials, exact: set[int]) -> tuple[float | None, Values]:
    """The layer's error and outputs with some operators exact and all others on the backend."""
    operators = trials.operators
    try:
        values = operators.results(trials.without(exact, operators.values))
    except Exception as error:  # noqa: BLE001 (a backend's fault)
        _LOG.debug("the others were refused", exc_info=error)
        return None, operators.results(operators.values)
    return trials.distance(values), values
