"""Score the tokens of a text: what a decoder and a backend make of each window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.backends.compile_export import Compiled
from qeff_proxy.common.messages import counted
from qeff_proxy.compare.tally import Tally, Worst
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.score.results import Measured, WorstToken
from qeff_proxy.score.scorer import Scorer
from qeff_proxy.score.windows import beginning_of, windows_of
from qeff_proxy.session.session import Session

#: What is measured.
TOKENS = (
    *("reference", "candidate", "ratio", "kl", "top1", "top5", "flips"),
    "median",
    "p99",
    "max",
)
_BEFORE = 48  # characters of context that are shown


@dataclass(frozen=True)
class TokenScorer(Scorer):
    """Scores the windows of a text.

    Attributes:
        tokenizer: The checkpoint's.
        window: Tokens of a window.
    """

    tokenizer: Any
    window: int

    def measure(self, compiled: Compiled, sessions: Mapping[str, Session]) -> Measured:
        """Run all windows; as `Scorer.measure`."""
        options, tally = compiled.options, Tally(self.worst)
        parts, adapter = compiled.export.parts, compiled.export.adapter
        ours = CausalEngine(parts, self.reference, adapter=adapter)
        theirs = CausalEngine(parts, sessions, adapter=adapter)
        for batch in self._batches(options.batch_size):
            number = len(tally.windows) + 1
            self.progress(f"scoring on {compiled.backend}: window {number}")
            expected = all_logits(ours, batch, options.prefill_seq_len)
            actual = all_logits(theirs, batch, options.prefill_seq_len)
            for whose, logits in (("PyTorch's", expected), ("its", actual)):
                if not np.isfinite(logits).all():
                    raise UsageError(
                        f"{whose} logits have NaN or infinite elements in window {number}"
                    )
            for row, tokens in enumerate(batch):
                first = max(1, len(tokens) // 2)
                tally.add(expected[row], actual[row], tokens, first)
        measures = tally.measures()
        measures |= {"median": tally.quantile(0.5), "p99": tally.quantile(0.99)}
        worst = sorted(tally.worst, reverse=True)
        measures["max"] = tally.largest
        scored = int(sum(row[0] for row in tally.windows))
        windows = counted(len(tally.windows), "window")
        said = f"{scored} tokens scored, in {windows} of {self.window}"
        return Measured(measures, tally.intervals(), tuple(self._in_words(worst)), scored, said)

    def _batches(self, size: int) -> Iterator[Array]:
        """Windows of one length, ``[batch, length]``."""
        pending: list[Array] = []
        windows = windows_of(self.text, self.tokenizer, self.window)
        for ids in islice(windows, self.most):
            if pending and (len(pending) == size or ids.shape != pending[0].shape):
                yield np.concatenate(pending)
                pending = []
            pending.append(ids)
        if pending:
            yield np.concatenate(pending)

    def _in_words(self, worst: Sequence[Worst]) -> Iterator[WorstToken]:
        """The worst positions with their text."""
        wanted = {one.window for one in worst}
        windows = windows_of(self.text, self.tokenizer, self.window)
        last = max(wanted, default=-1)
        texts = {n: ids[0] for n, ids in zip(range(last + 1), windows, strict=False) if n in wanted}
        first = len(beginning_of(self.tokenizer))
        decode = self.tokenizer.decode
        for one in worst:
            tokens = texts[one.window].tolist()
            yield WorstToken(
                decode(tokens[first : one.position])[-_BEFORE:],
                decode(tokens[one.position : one.position + 1]),
                one.kl,
                one.reference,
                one.candidate,
                decode([one.expected]),
                decode([one.chosen]),
            )


def all_logits(
    engine: CausalEngine, ids: Array, chunk: int | None, padding: Array | None = None
) -> Array:
    """The logits of all positions, ``[batch, length, vocabulary]``.

    Args:
        engine: Runs the parts.
        ids: The tokens, ``[batch, length]``.
        chunk: How many positions run at once; ``None``: all.
        padding: 0 where a position is padded, ``[batch, length]``; ``None``: nowhere.
    """
    seen = np.ones(ids.shape, np.int64) if padding is None else padding
    longest = min(size for size in (engine.longest_step, chunk, ids.shape[1]) if size is not None)
    cache, pieces = None, []
    for index, begin in enumerate(range(0, ids.shape[1], longest)):
        piece = ids[:, begin : begin + longest]
        until = seen[:, : begin + piece.shape[1]]
        logits, cache = engine.step(StepId("prefill", index), piece, until, cache)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)
