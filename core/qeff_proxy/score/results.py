"""The scores of backends, as values, JSON and text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.errors import UsageError

#: What a limit may be of, and whether it is the least or the most.
LIMITS = {
    **dict.fromkeys(("ratio", "kl", "p99", "flips", "wer", "wer_more"), "most"),
    **dict.fromkeys(("top1", "top5", "cosine", "p01", "least", "rank", "nearest"), "least"),
    **dict.fromkeys(("same", "alike"), "least"),
}


@dataclass(frozen=True)
class WorstToken:
    """A token of the text at which the backend differs most.

    Attributes:
        before: The text before it.
        token: It.
        kl: The divergence of the two distributions, in nats.
        reference: Its probability by the reference.
        candidate: Its probability by the backend.
        expected: The reference's first token.
        chosen: The backend's.
    """

    before: str
    token: str
    kl: float
    reference: float
    candidate: float
    expected: str
    chosen: str

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.1e} at …{self.before}[{self.token}]: {self.reference:.1%} in PyTorch "
            f"and {self.candidate:.1%}; first {self.expected!r} and {self.chosen!r}"
        )


@dataclass(frozen=True)
class WorstLine:
    """A line whose vector differs most.

    Attributes:
        cosine: Of the backend's vector and PyTorch's.
        line: Its beginning.
    """

    cosine: float
    line: str

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f} of {self.line}"


@dataclass(frozen=True)
class WorstAnswer:
    """A transcript or an answer that is another.

    Attributes:
        file: The name of the recording or image.
        reference: What PyTorch says of it.
        candidate: What the backend says.
        more: Words that the backend has wrong beyond those that PyTorch has.
    """

    file: str
    reference: str
    candidate: str
    more: int

    def __str__(self) -> str:
        return f"{self.file}: {self.reference!r} in PyTorch and {self.candidate!r}"


@dataclass(frozen=True)
class Measured:
    """What was measured of one backend.

    Attributes:
        measures: By name.
        intervals: Where a measure is with 95% certainty.
        worst: The worst tokens, lines or answers, the worst first.
        scored: How many there were.
        said: The same in words.
    """

    measures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    worst: tuple[WorstToken | WorstLine | WorstAnswer, ...]
    scored: int
    said: str


@dataclass(frozen=True)
class BackendScore:
    """What one backend's precision costs on the text.

    Attributes:
        backend: Its name.
        precision: What it computes in, where that is less than the model's dtype.
        error: Why it has no score, or ``None``.
        measures: By name (docs/score.md): of tokens `qeff_proxy.compare.tally.measures_of`, and
            ``median``, ``p99`` and ``max`` of the divergence; of vectors ``cosine``, ``p01``,
            ``least``, ``rank`` and ``nearest``; of answers ``same`` and ``alike``, and of
            transcripts ``wer``, ``wer_reference`` and ``wer_more``.
        intervals: Where a measure is with 95% certainty (windows, lines or files resampled).
        worst: The tokens, lines or answers that differ most, the worst first.
        missed: The limits that it does not keep, in words.
    """

    backend: str
    precision: str | None = None
    error: str | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    worst: tuple[WorstToken | WorstLine | WorstAnswer, ...] = ()
    missed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it ran, and keeps the limits."""
        return self.error is None and not self.missed


@dataclass(frozen=True)
class Score:
    """A text, scored.

    Attributes:
        source: The model.
        text: The file.
        scored: How many tokens, lines or files are scored.
        said: The same in words.
        backends: Their scores.
    """

    source: str
    text: str
    scored: int
    said: str
    backends: tuple[BackendScore, ...]

    @property
    def passed(self) -> bool:
        """Whether all backends ran and keep the limits."""
        return all(one.passed for one in self.backends)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = plain_json(self)
        return {**value, "passed": self.passed}


def parse_limits(text: str) -> dict[str, float]:
    """Read ``NAME:VALUE,…``.

    Raises:
        UsageError: It is not of that form.
    """
    limits = {}
    for piece in text.split(","):
        name, _, value = piece.partition(":")
        try:
            limits[name] = float(value)
            if name not in LIMITS or not limits[name] >= 0:
                raise ValueError
        except ValueError:
            known = ", ".join(LIMITS)
            raise UsageError(
                f"--limit {piece} is not NAME:VALUE", f"Names are {known}; such as kl:0.01."
            ) from None
    return limits


def check_limits(limits: Mapping[str, float], measured: Collection[str]) -> None:
    """Refuse limits of what is not measured.

    Args:
        limits: By name.
        measured: What will be measured of the model.

    Raises:
        UsageError: A limit is of something else.
    """
    for name in limits:
        if name not in measured:
            known = ", ".join(one for one in LIMITS if one in measured)
            raise UsageError(f"{name} is not measured of such a model", f"Limits are of {known}.")


def missed_limits(measures: Mapping[str, float], limits: Mapping[str, float]) -> tuple[str, ...]:
    """The limits that are not kept, in words; a NaN keeps none."""
    missed = []
    for name, limit in limits.items():
        value = measures[name]
        if not (value <= limit if LIMITS[name] == "most" else value >= limit):
            side = "below" if value < limit else "above"
            missed.append(f"{name} {value:.4g} is {side} {limit:g}")
    return tuple(missed)
