"""Which steps and tensors of a run are written: the options of a dump."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from qeff_proxy.common.arguments import texts
from qeff_proxy.errors import UsageError

_EVERY = re.compile(r"every:(\d+)\Z")
_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?\Z")
# Steps counted from the end are held in memory until the run ends, so their number is bounded.
MAX_HELD_STEPS = 64


@dataclass(frozen=True)
class DumpOptions:
    """What a dump keeps.

    Attributes:
        steps: ``all``, ``first``, ``last``, ``every:N``, or ``A:B``, a Python-like range over the
            steps of the run, counted from 0 over prefill chunks and decode steps alike. Steps
            counted from the end (``last``, ``-3:``) are copied and held until the run ends.
        tensors: A glob, or several, over ``part.direction.tensor[.layer-NN]``; a tensor matching
            one is kept.
        kv: ``delta`` keeps the cache rows that each step added, ``full`` the whole cache.

    Raises:
        UsageError: An option cannot be right.
    """

    steps: str = "all"
    tensors: str | Sequence[str] = ("*",)
    kv: Literal["delta", "full"] = "delta"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, str):
            raise UsageError(
                f"io_steps is {self.steps!r}", "Use all, first, last, every:N or a range A:B."
            )
        StepSelection.parse(self.steps)
        object.__setattr__(self, "tensors", tuple(texts("io_tensors", self.tensors)))
        if not self.tensors or not all(self.tensors):
            raise UsageError("no glob says which tensors to keep", "Use '*' for all of them.")
        if self.kv not in ("delta", "full"):
            raise UsageError(f"kv is {self.kv!r}", "Use 'delta' or 'full'.")


@dataclass(frozen=True)
class StepSelection:
    """A parsed ``steps`` option: ``range(total)[start:stop:every]`` of a run of ``total`` steps."""

    start: int | None
    stop: int | None
    every: int = 1

    @classmethod
    def parse(cls, text: str) -> StepSelection:
        """Read a ``steps`` option.

        Raises:
            UsageError: It is none of the forms that `DumpOptions` lists, or selects nothing.
        """
        fixed = {"all": cls(None, None), "first": cls(0, 1), "last": cls(-1, None)}
        if text in fixed:
            return fixed[text]
        if (match := _EVERY.match(text)) and int(match[1]) > 0:
            return cls(None, None, int(match[1]))
        if (match := _RANGE.match(text)) is None:
            raise UsageError(
                f"{text!r} selects no steps", "Use all, first, last, every:N or a range A:B."
            )
        start, stop = (int(g) if g is not None else None for g in match.groups())
        if start is not None and stop is not None and start >= stop and (start < 0) == (stop < 0):
            raise UsageError(f"the range of steps {text!r} is empty")
        selection = cls(start, stop)
        if selection.held > MAX_HELD_STEPS:
            raise UsageError(
                f"{text!r} counts more than {MAX_HELD_STEPS} steps from the end",
                "Give the range from the start of the run.",
            )
        return selection

    @property
    def held(self) -> int:
        """How many of the latest steps must be held back until it is known which they are."""
        return max(-(self.start or 0), -(self.stop or 0), 0)

    def keeps_old(self, number: int) -> bool:
        """Whether step ``number`` is kept, `held` steps or more having followed it."""
        if self.start is not None and (self.start < 0 or number < self.start):
            return False
        if self.stop is not None and self.stop >= 0 and number >= self.stop:
            return False
        return number % self.every == 0

    def keeps_last(self, number: int, total: int) -> bool:
        """Whether step ``number`` is kept, the run having ended after ``total`` steps."""
        return number in range(*slice(self.start, self.stop, self.every).indices(total))


def matches_any(name: str, globs: Sequence[str]) -> bool:
    """Whether ``name`` matches one of ``globs`` (shell globs, case-sensitive)."""
    return any(fnmatchcase(name, glob) for glob in globs)
