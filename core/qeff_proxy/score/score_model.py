"""Score a causal language model on a text, on several backends and in PyTorch.

The text is cut into windows of tokens. PyTorch and the backend run each window; the second half of
it is scored, whose tokens have at least half a window of context (as llama.cpp's ``perplexity``
does). One backend at a time is in memory beside PyTorch, so PyTorch runs once for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import compile_export, fixed_lengths, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.load.load_model import LoadedModel, load_config, most_positions
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.run.calibration import takes_calibration, with_calibration
from qeff_proxy.score.results import BackendScore, Score, WorstToken, missed_limits
from qeff_proxy.score.tally import Tally, Worst
from qeff_proxy.score.windows import beginning_of, windows_of
from qeff_proxy.session.session import Session
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.results import reason_of
from qeff_proxy.verify.verify_model import (
    check_names,
    export_of,
    installed_hooks,
    live_proxy,
    opened,
)

if TYPE_CHECKING:
    from qeff_proxy.compile_options import CompileOptions

_LOG = logging.getLogger(__name__)
_FLOW = "causal-lm"
_WINDOW = 512
_BEFORE = 48  # characters of context that are shown


@dataclass(frozen=True)
class ScoreOptions:
    """How a text is scored.

    Attributes:
        window: Tokens of a window; by default 512, or the model's positions if those are fewer.
        windows: Score no more than the first so many.
        worst: How many of the worst tokens to name.
        limits: Measure → the most or the least it may be (`qeff_proxy.score.results.LIMITS`).
        verify: Export, shapes and options of the backends, as for a verification.
    """

    window: int | None = None
    windows: int | None = None
    worst: int = 10
    limits: Mapping[str, float] = field(default_factory=dict)
    verify: VerifyOptions = field(default_factory=VerifyOptions)


def score_model(
    model: str | Path | LoadedModel | Export,
    backends: Sequence[str],
    text: Path,
    options: ScoreOptions | None = None,
    *,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Score:
    """Compare what backends and PyTorch say of the tokens of a text.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export (its folder, or read).
        backends: Their names.
        text: A file in UTF-8.
        options: How to score.
        hooks: Of the model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: The model is no causal language model, the text cannot be read, or the window
            does not fit. A failure of one backend is not raised but kept in its score.
        CheckpointError: The checkpoint has no tokenizer.
    """
    options = options or ScoreOptions()
    check_names(backends, options.verify)
    model = opened(model, trust_remote_code)
    folder = model.processor_folder if isinstance(model, Export) else model.folder
    if folder is None:
        raise UsageError("a model made in memory has no tokenizer", "Save it, and name the folder.")
    tokenizer = load_processor(folder, trust_remote_code=trust_remote_code)
    window = _window_of(options, folder)
    next(windows_of(text, tokenizer, window))  # before the work begins
    hooks = hooks or installed_hooks(model)
    export = export_of(model, hooks, replace(options.verify, taps=_taps_of(model)), progress)
    if export.flow != _FLOW or export.kind == "stub":
        raise UsageError(
            f"{export.model['source']} runs as {export.flow} ({export.kind}); a text is scored by "
            f"the logits of a {_FLOW}",
            "Name a causal language model.",
        )
    loaded = model if isinstance(model, LoadedModel) else None
    parts = live_proxy(loaded, hooks, export).parts
    reference = {part.name: TorchSession(part) for part in parts}
    scorer = _Scorer(export, hooks, text, tokenizer, window, options, reference, progress)
    scores = tuple(scorer.score(name) for name in dict.fromkeys(backends))
    return Score(export.model["source"], str(text), window, scorer.windows, scorer.tokens, scores)


def _taps_of(model: LoadedModel | Export) -> tuple[str, ...]:
    """None of a checkpoint; an export keeps its own."""
    return tuple(model.settings.get("taps", ())) if isinstance(model, Export) else ()


def _window_of(options: ScoreOptions, folder: Path) -> int:
    """Tokens of a window, which must fit into the model's context and the backends'."""
    rooms = (most_positions(load_config(folder)), options.verify.compile.ctx_len)
    room = min((size for size in rooms if size is not None), default=None)
    window = options.window if options.window is not None else min(_WINDOW, room or _WINDOW)
    if window < 2 or (room is not None and window > room):
        raise UsageError(
            f"a window of {window} tokens does not fit",
            f"Choose from 2 to {room}." if room is not None else "Choose 2 or more.",
        )
    return window


@dataclass
class _Scorer:
    """One text, scored on one backend after the other."""

    export: Export
    hooks: Hooks
    text: Path
    tokenizer: Any
    window: int
    options: ScoreOptions
    reference: Mapping[str, Session]
    progress: Callable[[str], None]
    windows: int = 0
    tokens: int = 0

    def score(self, name: str) -> BackendScore:
        """The score of one backend; an exception becomes its error."""
        tally = Tally(self.options.worst)
        try:
            compiled_options = self._options_of(name)
            precision = load_backend(name).precision(compiled_options)
            self.progress(f"compiling for {name}")
            compiled = compile_export(
                self.export,
                name,
                compiled_options,
                force=self.options.verify.force,
                check=True,
                wait=self.options.verify.wait,
                progress=self.progress,
            )
            with ExitStack() as stack:
                sessions = stack.enter_context(open_sessions(compiled, self.hooks))
                self._run(name, compiled.options, sessions, tally)
        except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
            _LOG.debug("%s failed", name, exc_info=error)
            return BackendScore(name, error=reason_of(error))
        self.windows = len(tally.windows)
        self.tokens = int(sum(row[0] for row in tally.windows))
        measures = tally.measures()
        measures |= {"median": tally.quantile(0.5), "p99": tally.quantile(0.99)}
        worst = sorted(tally.worst, reverse=True)
        measures["max"] = worst[0].kl if worst else 0.0
        return BackendScore(
            name,
            precision,
            None,
            measures,
            tally.intervals(),
            tuple(self._in_words(worst)),
            missed_limits(measures, self.options.limits),
        )

    def _options_of(self, name: str) -> CompileOptions:
        options = self.options.verify.compile_for(name)
        if load_backend(name).needs_fixed_shapes(options):
            lengths = replace(
                options,
                ctx_len=options.ctx_len or self.window,
                prefill_seq_len=options.prefill_seq_len or self.window,
            )
            options = fixed_lengths(self.export, lengths)
        if takes_calibration(name):
            options = with_calibration(
                self.export,
                self.hooks,
                name,
                options,
                self.options.verify.calibration,
                processor=self.tokenizer,
                progress=self.progress,
            )
        return options

    def _run(
        self,
        name: str,
        options: CompileOptions,
        sessions: Mapping[str, Session],
        tally: Tally,
    ) -> None:
        """Run all windows on PyTorch and on a backend."""
        ours = CausalEngine(self.export.parts, self.reference)
        theirs = CausalEngine(self.export.parts, sessions)
        for batch in self._batches(options.batch_size):
            self.progress(f"scoring on {name}: window {len(tally.windows) + 1}")
            expected = _logits(ours, batch, options.prefill_seq_len)
            actual = _logits(theirs, batch, options.prefill_seq_len)
            if not np.isfinite(actual).all():
                number = len(tally.windows) + 1
                raise UsageError(f"its logits have NaN or infinite elements in window {number}")
            for row, tokens in enumerate(batch):
                first = max(1, len(tokens) // 2)
                tally.add(expected[row], actual[row], tokens, first)

    def _batches(self, size: int) -> Iterator[Array]:
        """Windows of one length, ``[batch, length]``."""
        pending: list[Array] = []
        for number, ids in enumerate(windows_of(self.text, self.tokenizer, self.window)):
            if number == self.options.windows:
                break
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


def _logits(engine: CausalEngine, ids: Array, chunk: int | None) -> Array:
    """The logits of all positions, ``[batch, length, vocabulary]``."""
    longest = min(size for size in (engine.longest_step, chunk, ids.shape[1]) if size is not None)
    cache, pieces = None, []
    for index, begin in enumerate(range(0, ids.shape[1], longest)):
        piece = ids[:, begin : begin + longest]
        seen = np.ones((len(ids), begin + piece.shape[1]), np.int64)
        logits, cache = engine.step(StepId("prefill", index), piece, seen, cache)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)
