"""Add up what two models say of the tokens of a text.

Of each scored position ``P`` is the reference's distribution of the next token and ``Q`` the
backend's, both the softmax of their logits in float64.

- Perplexity: ``exp`` of the mean of ``-log P(token)``.
- Divergence: ``KL(P || Q) = sum P (log P - log Q)`` in nats (Kullback and Leibler, 1951), as
  ``--kl-divergence`` of llama.cpp's ``perplexity`` has it.
- Flips: positions at which one of the two has the text's token first and the other has not
  (Dutta et al., "Accuracy is Not All You Need", 2024).

Tokens of a window depend on each other, so the intervals resample windows (block bootstrap).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.arrays import Array

#: The columns of a window's sums.
COLUMNS = ("tokens", "reference", "candidate", "kl", "same", "five", "flips")
_FIVE = 5
_SLICE = 1 << 20  # elements of logits that are in float64 at once
_DRAWS = 1000
#: Nats; each bin is 1.1% wide, and the last one has all above.
_EDGES = np.concatenate([[0.0], np.logspace(-16, 3, 4000), [np.inf]])


@dataclass(frozen=True, order=True)
class Worst:
    """A position with a large divergence.

    Attributes:
        kl: In nats.
        window: Number of its window.
        position: Of the token within it.
        reference: Probability that the reference gives the text's token.
        candidate: Probability that the backend gives it.
        expected: The reference's first token.
        chosen: The backend's.
    """

    kl: float
    window: int
    position: int
    reference: float
    candidate: float
    expected: int
    chosen: int


@dataclass
class Tally:
    """Sums over the windows of a text.

    Attributes:
        keep: How many of the worst positions to keep.
        windows: For each window its sums (`COLUMNS`).
        worst: The worst positions, a heap.
        largest: The largest divergence.
        histogram: Of the divergences, by `_EDGES`.
    """

    keep: int = 10
    windows: list[NDArray[np.float64]] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    largest: float = 0.0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_EDGES), np.int64))

    def add(self, expected: Array, actual: Array, tokens: Array, first: int) -> None:
        """Add a window.

        Args:
            expected: The reference's logits, ``[positions, vocabulary]``: of the tokens after each.
            actual: The backend's.
            tokens: The window's tokens ``[positions]``.
            first: The first token that is scored, from 1 on.
        """
        window, sums = len(self.windows), np.zeros(len(COLUMNS))
        step = max(1, _SLICE // expected.shape[-1])
        for begin in range(first, len(tokens), step):
            end = min(begin + step, len(tokens))
            rows = slice(begin - 1, end - 1)
            sums += self._add(expected[rows], actual[rows], tokens[begin:end], window, begin)
        self.windows.append(sums)

    def _add(
        self, expected: Array, actual: Array, tokens: Array, window: int, begin: int
    ) -> NDArray[np.float64]:
        reference, candidate = _log_softmax(expected), _log_softmax(actual)
        at = np.arange(len(tokens))
        with np.errstate(invalid="ignore"):  # of what has no probability in either
            terms = np.exp(reference) * (reference - candidate)
        kl = np.maximum(np.where(np.isneginf(reference), 0.0, terms).sum(1), 0.0)
        self.largest = max(self.largest, float(kl.max()))
        first, other = reference.argmax(1), candidate.argmax(1)
        better = (candidate > candidate[at, first][:, None]).sum(1)
        right = (first == tokens) != (other == tokens)
        self.histogram += np.bincount(np.searchsorted(_EDGES, kl), minlength=len(_EDGES))
        for n in np.argsort(-kl)[: self.keep]:
            place = (window, begin + int(n))
            given = np.exp(reference[n, tokens[n]]), np.exp(candidate[n, tokens[n]])
            worst = Worst(
                float(kl[n]), *place, float(given[0]), float(given[1]), int(first[n]), int(other[n])
            )
            heapq.heappush(self.worst, worst)
            if len(self.worst) > self.keep:
                heapq.heappop(self.worst)
        return np.array(
            [
                len(tokens),
                -reference[at, tokens].sum(),
                -candidate[at, tokens].sum(),
                kl.sum(),
                (first == other).sum(),
                (better < _FIVE).sum(),
                right.sum(),
            ]
        )

    def quantile(self, share: float) -> float:
        """The divergence below which a share of the positions is, to 1%."""
        total = int(self.histogram.sum())
        at = int(np.searchsorted(np.cumsum(self.histogram), share * total))
        return min(float(_EDGES[min(at, len(_EDGES) - 1)]), self.largest)

    def measures(self) -> dict[str, float]:
        """The measures of all windows: see `measures_of`."""
        return {name: float(v) for name, v in measures_of(np.sum(self.windows, 0)).items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Where each measure is with 95% certainty; nothing for fewer than two windows."""
        rows = np.array(self.windows)
        if len(rows) < 2:
            return {}
        draws = np.random.default_rng(0)
        # How often each window is drawn: as if windows were, but with little memory.
        sums = np.array(
            [
                draws.multinomial(len(rows), np.full(len(rows), 1 / len(rows))) @ rows
                for _ in range(_DRAWS)
            ]
        )
        with np.errstate(invalid="ignore"):
            bounds = {
                name: np.quantile(values, [0.025, 0.975])
                for name, values in measures_of(sums).items()
            }
        return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def measures_of(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The measures of sums ``[…, COLUMNS]``.

    Returns:
        ``reference`` and ``candidate`` (perplexities), ``ratio`` of the second to the first, ``kl``
        (mean), and the shares ``top1`` (same first token), ``top5`` (the reference's first token
        among the backend's first five) and ``flips``.
    """
    count, reference, candidate, kl, same, five, flips = np.moveaxis(sums, -1, 0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return {
            "reference": np.exp(reference / count),
            "candidate": np.exp(candidate / count),
            "ratio": np.exp((candidate - reference) / count),
            "kl": kl / count,
            "top1": same / count,
            "top5": five / count,
            "flips": flips / count,
        }


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
