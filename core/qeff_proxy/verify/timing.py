"""Time several contenders in turns, so that a busy machine slows all of them alike.

`take_turns` measures; a `Speed` holds the timings and names the quickest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Speeds that differ by no more than this share are as good as equal.
NEAR = 0.05
#: Where the middle half of the turns differs by more than this share, the machine had other work.
NOISY = 0.2
#: A turn lasts at least so many seconds: short runs are repeated.
_LEAST_TURN = 0.1
#: After a first run of so many seconds, its time is known well enough.
_SLOW = 1.0


@dataclass(frozen=True)
class Timing:
    """The turns of one contender.

    Attributes:
        name: Of the contender: a backend's, or what it is.
        seconds: Of each turn, the seconds of one run.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of its turns, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """By how much the middle half of its turns differs, as a share of their median."""
        if len(self.seconds) == 1:
            return 0.0
        first, _, last = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (last - first) / self.median


@dataclass(frozen=True)
class Speed:
    """The speed of backends, and of PyTorch, on the same input.

    Attributes:
        amount: The amount of work in one run, in `unit`.
        unit: Its unit, in the plural: ``"tokens"``, ``"texts"``, ``"seconds of sound"``.
        timings: Of the backends that passed and whose speed means something on this machine.
        reference: Of the uncut model in PyTorch; ``None`` where it was not measured.
        left_out: Name → why it is not among `timings`.
        notes: Remarks on the figures.
    """

    amount: float
    unit: str
    timings: tuple[Timing, ...]
    reference: Timing | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Timing | None:
        """The quickest backend; ``None`` where none can be chosen."""
        return min(self.timings, key=lambda one: one.median, default=None)

    @property
    def near(self) -> list[str]:
        """Backends within 5% of the quickest, without the quickest itself."""
        best = self.best
        if best is None:
            return []
        return [
            one.name
            for one in self.timings
            if one is not best and best.median / one.median >= 1 - NEAR
        ]

    @property
    def spread(self) -> float:
        """The largest spread of a contender (`Timing.spread`); 0.0 without any."""
        reference = () if self.reference is None else (self.reference,)
        return max((one.spread for one in (*self.timings, *reference)), default=0.0)

    @property
    def noisy(self) -> bool:
        """Whether turns differ so much that a small lead means nothing."""
        return self.spread > NOISY

    def rate(self, timing: Timing) -> float:
        """How much of `unit` a contender does in a second, by the median of its turns."""
        return self.amount / timing.median

    def over_reference(self, timing: Timing) -> float | None:
        """How many times as fast as PyTorch a contender is; ``None`` without a reference."""
        return None if self.reference is None else self.reference.median / timing.median

    def to_json(self) -> dict[str, Any]:
        """The speeds as a JSON object."""
        best = self.best
        return {
            "unit": self.unit,
            "amount": self.amount,
            "best": best.name if best is not None else None,
            "near": self.near,
            "noisy": self.noisy,
            "pytorch": self._described(self.reference) if self.reference is not None else None,
            "backends": [self._described(one) for one in self.timings],
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }

    def _described(self, timing: Timing) -> dict[str, Any]:
        over = self.over_reference(timing)
        return {
            "name": timing.name,
            "a_second": float(f"{self.rate(timing):.5g}"),
            "over_pytorch": None if over is None else round(over, 3),
            "seconds": [float(f"{one:.5g}") for one in timing.seconds],
        }


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    turns: int,
    progress: Callable[[str], None] = lambda _stage: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Run contenders one after another, turn by turn, each turn in the reverse order of the last.

    Each runs unmeasured first. One that fails is out, and the others go on.

    Args:
        contenders: Name → one run.
        turns: How many there are.
        progress: Called with the name of each stage as it starts.

    Returns:
        The timings by name, and the exceptions of those that failed.
    """
    failed: dict[str, Exception] = {}
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        progress(f"warming up {name}")
        try:
            last = _seconds(run, 1)
            if last < _SLOW:  # the first run of all is slower, which must not count
                last = _seconds(run, 1)
        except Exception as error:  # noqa: BLE001 (a contender's own fault must not stop the others)
            failed[name] = error
            continue
        repeats[name] = max(1, round(_LEAST_TURN / max(last, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    order = list(repeats)
    for turn in range(turns):
        progress(f"measuring speed, turn {turn + 1} of {turns}")
        for name in order:
            seconds[name].append(_seconds(contenders[name], repeats[name]))
        order.reverse()
    return {name: Timing(name, tuple(turns_of)) for name, turns_of in seconds.items()}, failed


def _seconds(run: Callable[[], object], times: int) -> float:
    """The seconds of one run, by the clock, over several."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times
