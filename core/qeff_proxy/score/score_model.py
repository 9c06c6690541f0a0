"""Score a model on a text, on several backends and in PyTorch.

A causal language model's text is cut into windows of tokens. PyTorch and the backend run each
window; the second half of it is scored, whose tokens have at least half a window of context (as
llama.cpp's ``perplexity`` does). An embedder's text is embedded line by line. A text that lists
recordings or images is put to a model of those. One backend at a time is in memory beside PyTorch,
so PyTorch runs once for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import compile_export, fixed_lengths, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.arguments import whole_number
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import UsageError
from qeff_proxy.load.load_model import LoadedModel, load_config, most_positions
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.parts import Kind
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.run.calibration import takes_calibration, with_calibration
from qeff_proxy.score.results import BackendScore, Score, check_limits, missed_limits
from qeff_proxy.score.score_answers import ANSWERS, TRANSCRIPTS, AnswerScorer, listed_in
from qeff_proxy.score.score_tokens import TOKENS, TokenScorer
from qeff_proxy.score.score_vectors import VECTORS, VectorScorer, check_lines
from qeff_proxy.score.scorer import Scorer
from qeff_proxy.score.windows import windows_of
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
_TOKENS, _VECTORS = "causal-lm", "encoder"
_WINDOW = 512
#: Lengths that texts are padded to on a backend of fixed shapes.
_LENGTHS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ScoreOptions:
    """How a text is scored.

    Attributes:
        window: Tokens of a window; by default 512, or the model's positions if those are fewer.
        windows: Score no more than the first so many.
        new_tokens: The most tokens of an answer (by default 64) or a transcript.
        worst: How many of the worst tokens to name.
        limits: Measure → the most or the least it may be (`qeff_proxy.score.results.LIMITS`).
        verify: Export, shapes and options of the backends, as for a verification.
    """

    window: int | None = None
    windows: int | None = None
    worst: int = 10
    new_tokens: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    verify: VerifyOptions = field(default_factory=VerifyOptions)

    def __post_init__(self) -> None:
        for name in ("window", "windows", "new_tokens"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))


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
        UsageError: The model is not one for the text, the text cannot be read, a limit is of what
            is not measured, or the window does not fit. A failure of one backend is not raised but
            kept in its score.
        CheckpointError: The checkpoint has no tokenizer.
    """
    options = options or ScoreOptions()
    check_names(backends, options.verify)
    model = opened(model, trust_remote_code)
    folder = model.processor_folder if isinstance(model, Export) else model.folder
    if folder is None:
        raise UsageError("a model made in memory has no tokenizer", "Save it, and name the folder.")
    tokenizer = load_processor(folder, trust_remote_code=trust_remote_code)
    listed = {one.kind for one in listed_in(text)}  # a bad line is refused before the work begins
    window = _window_of(options, folder)
    if not listed:
        next(windows_of(text, getattr(tokenizer, "tokenizer", tokenizer), window))
    hooks = hooks or installed_hooks(model)
    flow, kind, source = _flow_of(model, hooks, options.verify.kind)
    if (flow in (_TOKENS, _VECTORS)) == bool(listed) or kind == "stub":
        raise UsageError(
            f"{source} runs as {flow} ({kind}), which {text} is no text for",
            "A causal language model or an embedder is scored on a plain text; a model of sound "
            "or images on lines of a file, a tab and its transcript or question.",
        )
    if listed:
        check_limits(options.limits, ANSWERS if listed == {"image"} else (*ANSWERS, *TRANSCRIPTS))
    else:
        check_limits(options.limits, TOKENS if flow == _TOKENS else VECTORS)
    if not listed and flow == _VECTORS:
        check_lines(text, options.windows)
    export = export_of(model, hooks, replace(options.verify, taps=_taps_of(model)), progress)
    loaded = model if isinstance(model, LoadedModel) else None
    parts = live_proxy(loaded, hooks, export).parts
    reference = {part.name: TorchSession(part) for part in parts}
    about = (text, options.windows, options.worst, reference, progress)
    scorer: Scorer
    if listed:
        scorer = AnswerScorer(*about, tokenizer, hooks, options.new_tokens)
    elif export.flow == _TOKENS:
        scorer = TokenScorer(*about, tokenizer, window)
    else:
        scorer = VectorScorer(*about, tokenizer, hooks)
    run = _Run(export, hooks, tokenizer, window, options, scorer, progress)
    scores = tuple(run.score(name) for name in dict.fromkeys(backends))
    return Score(export.model["source"], str(text), run.scored, run.said, scores)


def _flow_of(model: LoadedModel | Export, hooks: Hooks, kind: Kind) -> tuple[str, str, str]:
    """How a model runs, how it is cut, and its name: known before it is exported."""
    if isinstance(model, Export):
        return model.flow, model.kind, model.model["source"]
    return cut_model(model, hooks, kind, verify=False).proxy.flow, kind, model.source


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
class _Run:
    """One text, scored on one backend after the other."""

    export: Export
    hooks: Hooks
    tokenizer: Any
    window: int
    options: ScoreOptions
    scorer: Scorer
    progress: Callable[[str], None]
    scored: int = 0
    said: str = "nothing was scored"

    def score(self, name: str) -> BackendScore:
        """The score of one backend; an exception becomes its error."""
        try:
            chosen = self._options_of(name)
            precision = load_backend(name).precision(chosen)
            self.progress(f"compiling for {name}")
            compiled = compile_export(
                self.export,
                name,
                chosen,
                force=self.options.verify.force,
                check=True,
                wait=self.options.verify.wait,
                progress=self.progress,
            )
            with open_sessions(compiled, self.hooks) as sessions:
                measured = self.scorer.measure(compiled, sessions)
        except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
            _LOG.debug("%s failed", name, exc_info=error)
            return BackendScore(name, error=reason_of(error))
        self.scored, self.said = measured.scored, measured.said
        return BackendScore(
            name,
            precision,
            None,
            measured.measures,
            measured.intervals,
            measured.worst,
            missed_limits(measured.measures, self.options.limits),
        )

    def _options_of(self, name: str) -> CompileOptions:
        options = self.options.verify.compile_for(name)
        if load_backend(name).needs_fixed_shapes(options):
            options = fixed_lengths(self.export, self._with_lengths(options))
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

    def _with_lengths(self, options: CompileOptions) -> CompileOptions:
        """The lengths of a backend of fixed shapes, where the user names none."""
        if self.export.flow == _VECTORS:
            most = min(self.export.settings["max_length"] or _LENGTHS[-1], _LENGTHS[-1])
            lengths = (*(length for length in _LENGTHS if length < most), most)
            return replace(options, seq_len=options.seq_len or lengths)
        return replace(
            options,
            ctx_len=options.ctx_len or self.window,
            prefill_seq_len=options.prefill_seq_len or self.window,
        )
