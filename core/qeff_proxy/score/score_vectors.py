"""Score the vectors of an embedder: what a backend's precision does to similarity and ranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.backends.compile_export import Compiled
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from qeff_proxy.score.results import Measured, WorstLine
from qeff_proxy.score.scorer import Scorer
from qeff_proxy.score.windows import blocks_of
from qeff_proxy.session.session import Session

#: What is measured.
VECTORS = ("cosine", "p01", "least", "rank", "nearest")
_BATCH = 32
_PAIRS = 2000  # lines whose similarities are ranked: all pairs of them
_DRAWS = 200
_SHOWN = 80  # characters of a line


@dataclass(frozen=True)
class VectorScorer(Scorer):
    """Embeds the lines of a text; each that is not blank is a text of its own.

    Attributes:
        tokenizer: The checkpoint's.
        hooks: Of the model type.
    """

    tokenizer: Any
    hooks: Hooks

    def measure(self, compiled: Compiled, sessions: Mapping[str, Session]) -> Measured:
        """Embed all lines; as `Scorer.measure`."""
        cosines: list[NDArray[np.float64]] = []
        kept: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        worst: list[WorstLine] = []
        done = 0
        for batch in self._batches():
            self.progress(f"scoring on {compiled.backend}: line {done + 1}")
            expected = _unit(self._embed(compiled, batch, self.reference))
            actual = _unit(self._embed(compiled, batch, sessions))
            if not np.isfinite(actual).all():
                raise UsageError(f"its vectors have NaN or infinite elements from line {done + 1}")
            cosines.append(np.sum(expected * actual, axis=1))
            if done < _PAIRS:
                kept.append((expected, actual))
            found = zip(cosines[-1].tolist(), batch, strict=True)
            worst += [WorstLine(cosine, line[:_SHOWN]) for cosine, line in found]
            worst = sorted(worst, key=lambda one: one.cosine)[: self.worst]
            done += len(batch)
        ours, theirs = (np.concatenate(each)[:_PAIRS] for each in zip(*kept, strict=True))
        measures, intervals = _measures(np.concatenate(cosines), ours, theirs)
        return Measured(
            measures, intervals, tuple(worst), done, f"{counted(done, 'line')} embedded"
        )

    def _batches(self) -> Iterator[list[str]]:
        chosen = islice(_lines_of(self.text), self.most)
        while batch := list(islice(chosen, _BATCH)):
            yield batch

    def _embed(
        self, compiled: Compiled, lines: list[str], sessions: Mapping[str, Session]
    ) -> NDArray[np.float64]:
        result = run_compiled(
            compiled,
            self.hooks,
            Request(prompts=tuple(lines)),
            processor=self.tokenizer,
            sessions=sessions,
        )
        vectors = result.outputs.get("sentence_embedding")
        if vectors is None:
            raise UsageError("the model has no pooling", "Choose one: -C pooling=mean.")
        return np.asarray(vectors, np.float64)


def check_lines(text: Path, most: int | None) -> None:
    """Refuse a text without two lines among the first ``most``.

    Raises:
        UsageError: It has fewer, or cannot be read.
    """
    found = sum(1 for _ in islice(_lines_of(text), min(2, most or 2)))
    if found < 2:
        raise UsageError(f"{text} has {counted(found, 'line')}", "Similarities need two or more.")


def _lines_of(text: Path) -> Iterator[str]:
    """The lines that are not blank."""
    return (line for block in blocks_of(text) for line in block.splitlines() if line.strip())


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return unit


def _measures(
    cosines: NDArray[np.float64], ours: NDArray[np.float64], theirs: NDArray[np.float64]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Measures, and where they are with 95% certainty, lines resampled.

    ``rank`` is Spearman's correlation of the similarities of all pairs of lines; ``nearest`` the
    share of lines whose most similar other line is the same.
    """
    first, second = ours @ ours.T, theirs @ theirs.T
    above = np.triu_indices(len(first), 1)
    nearest = _nearest(first) == _nearest(second)
    measures = {
        "cosine": float(cosines.mean()),
        "p01": float(np.quantile(cosines, 0.01)),
        "least": float(cosines.min()),
        "rank": _spearman(first[above], second[above]),
        "nearest": float(nearest.mean()),
    }
    draws = np.random.default_rng(0)

    def interval(values: NDArray[Any]) -> tuple[float, float]:
        count = len(values)
        means = [values[draws.integers(count, size=count)].mean() for _ in range(_DRAWS)]
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    return measures, {"cosine": interval(cosines), "nearest": interval(nearest)}


def _nearest(similar: NDArray[np.float64]) -> NDArray[np.int64]:
    others = similar - 4 * np.eye(len(similar))  # not the line itself
    nearest: NDArray[np.int64] = np.argmax(others, axis=1)
    return nearest


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's correlation of the ranks; equal values have the mean of their ranks."""
    if len(one) < 2:
        return float("nan")
    ranks = []
    for values in (one, other):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[inverse])
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
