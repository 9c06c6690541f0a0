"""Verify: the whole job on several backends, held against PyTorch.

1. The model is exported with layer taps, or an export is taken as it is.
2. PyTorch runs the parts on a real input: the reference. For a checkpoint it runs the model that
   was loaded, so that the exported weights are verified too; for an export, its own weights.
3. Each backend compiles the export and runs the same input. It is **fed the reference's tokens**,
   whatever it would have chosen, so that every step has the same inputs and can be compared.
4. Each dump is compared with the reference's (`qeff_proxy.compare`).

What fails on one backend stands in its row; the others go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.artifact import MANIFEST, Export, read_export
from qeff_proxy.backends import CompileOptions, is_static, load_backend, precision_of
from qeff_proxy.compare import Tolerances, compare_dumps
from qeff_proxy.compile import Compiled, compile_export, fixed_lengths
from qeff_proxy.dump import DumpOptions, read_dump
from qeff_proxy.errors import CheckpointError, ProxyError, UsageError
from qeff_proxy.load import LoadedModel, load_model, load_processor
from qeff_proxy.request import Request
from qeff_proxy.run import RunResult, new_run_name, run_compiled
from qeff_proxy.taps import normalize_taps
from qeff_proxy.verification import BackendResult, Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from qeff_proxy.dump import Dump
    from qeff_proxy.parts import Kind
    from qeff_proxy.plugin_hooks import Hooks
    from qeff_proxy.session import Session

__all__ = ["DEFAULT_PROMPT", "REFERENCE", "VerifyOptions", "verify_model"]

DEFAULT_PROMPT = "One morning, Anna went to the market and"
#: The folder of the reference's dump, beside those of the backends.
REFERENCE = "reference"
_RANDOM_IDS = 16


@dataclass(frozen=True)
class VerifyOptions:
    """How a model is verified.

    Attributes:
        kind: How a checkpoint is cut: ``"split"`` or ``"whole"``.
        taps: What a checkpoint is exported with (`qeff_proxy.taps`), ``"layers"`` unless said. An
            export has what it has.
        output: The folder of a checkpoint's export, where the default does not serve.
        opset: ONNX opset of a checkpoint's export.
        force: Export and compile again, whatever is there.
        max_new_tokens: Tokens to generate, for models that generate.
        tolerances: How far each tensor may be off; by dtype unless given.
        compile: Shapes and cores, for every backend.
        backends: What only one backend understands, by its name.
        calibration: What backends that quantize are calibrated on (`qeff_proxy.calibration`).
        io: Which steps and tensors are dumped and compared.
        io_folder: Where the dumps go; by default a new folder below ``io/`` of the export.
        html: Write a report for each backend: to this file, or with several backends to one beside
            it, with the backend's name before its ending.
    """

    kind: Kind = "split"
    taps: str | Sequence[str] | None = None
    output: Path | None = None
    opset: int | None = None
    force: bool = False
    max_new_tokens: int = 8
    tolerances: Tolerances | None = None
    compile: CompileOptions = field(default_factory=CompileOptions)
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Any = None
    io: DumpOptions = field(default_factory=DumpOptions)
    io_folder: Path | None = None
    html: Path | None = None


def verify_model(
    model: str | Path | LoadedModel | Export,
    backends: Sequence[str] = ("onnxruntime",),
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Verification:
    """Run a model on several backends and hold every tensor against PyTorch.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export (its folder, or read).
        backends: Their names.
        request: The input; by default `DEFAULT_PROMPT`, or random token ids where the model has no
            tokenizer.
        options: How.
        hooks: Of its model type, where the installed plugins are not meant.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Told what happens as it begins.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        ProxyError: The model cannot be loaded, cut, exported or run by PyTorch. What fails on a
            backend is no exception but stands in its result.
    """
    options = options or VerifyOptions()
    names = tuple(dict.fromkeys(backends))
    if not names:
        raise UsageError("no backend is named", "Name one or several, such as onnxruntime.")
    if isinstance(model, str | Path):
        model = _opened(Path(model).expanduser(), str(model), trust_remote_code)
    hooks = hooks or _installed_hooks(model)
    loaded = model if isinstance(model, LoadedModel) else None
    export = _export_of(model, hooks, options, progress)
    if export.kind == "stub":
        raise UsageError("a stub's outputs mean nothing, so there is nothing to verify")
    if any(_is_static(options, name) for name in names):
        # Every run has the same chunks and lengths then, so that its steps can be compared.
        options = replace(options, compile=fixed_lengths(export, options.compile))
    processor = _processor(export, trust_remote_code)
    run = _Runs(export, hooks, request or _default_request(export, processor), processor, options)
    progress("running PyTorch, the reference")
    reference = run.reference(loaded)
    return Verification(
        source=export.model["source"],
        export=export.folder,
        taps=tuple(export.settings.get("taps", ())),
        reference=run.folder / REFERENCE,
        weights="checkpoint" if loaded is not None else "export",
        input=run.described(),
        decoded=reference.decoded,
        results=tuple(_tried(run, name, len(names), progress) for name in names),
    )


def _opened(folder: Path, source: str, trust_remote_code: bool) -> LoadedModel | Export:
    if (folder / MANIFEST).is_file():
        return read_export(folder)
    return load_model(source, trust_remote_code=trust_remote_code)


def _installed_hooks(model: LoadedModel | Export) -> Hooks:
    from qeff_proxy.plugins import Plugins

    if isinstance(model, LoadedModel):
        return Plugins.discover().hooks_for(model.model_type)
    return Plugins.discover().hooks_for(model.model["model_type"], task=model.flow)


def _export_of(
    model: LoadedModel | Export,
    hooks: Hooks,
    options: VerifyOptions,
    progress: Callable[[str], None],
) -> Export:
    if isinstance(model, Export):
        has = tuple(model.settings.get("taps", ()))
        if options.taps is not None and (asked := normalize_taps(options.taps)) != has:
            raise UsageError(
                f"the export {model.folder} has the taps {', '.join(has) or 'none'}, not "
                f"{', '.join(asked) or 'none'}",
                "Name the checkpoint, to export it with other taps.",
            )
        return model
    from qeff_proxy.export import export_model

    return export_model(
        model,
        hooks,
        options.kind,
        output=options.output,
        opset=options.opset,
        taps="layers" if options.taps is None else options.taps,
        force=options.force,
        progress=progress,
    )


def _processor(export: Export, trust_remote_code: bool) -> Any:
    try:
        return load_processor(export.processor_folder, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def _default_request(export: Export, processor: Any) -> Request:
    if processor is not None:
        return Request(prompts=(DEFAULT_PROMPT,))
    rows = export.settings.get("embedding_rows")
    if rows is None:
        raise UsageError(
            f"{export.model['source']} has no tokenizer, and no input was given",
            "Give token ids or tensors.",
        )
    ids = np.random.default_rng(0).integers(0, rows, (1, _RANDOM_IDS))
    return Request(inputs={"input_ids": ids})


class _Runs:
    """One input, run by PyTorch and then by backends that are fed PyTorch's tokens."""

    def __init__(
        self,
        export: Export,
        hooks: Hooks,
        request: Request,
        processor: Any,
        options: VerifyOptions,
    ) -> None:
        self.export = export
        self.hooks = hooks
        self.request = request
        self.processor = processor
        self.options = options
        self.folder = options.io_folder or export.folder / "io" / f"verify-{new_run_name()}"
        self.tokens: list[torch.Tensor] = []
        outputs = [spec.name for part in export.parts for spec in part.outputs]
        self.generates = any(name.startswith("present.") for name in outputs)

    def reference(self, loaded: LoadedModel | None) -> RunResult:
        """Run PyTorch, and keep the tokens that it chose."""
        compiled = compile_export(self.export, "torch", self.options.compile)
        sessions = _live_sessions(loaded, self.hooks, self.export) if loaded is not None else None
        return self._run(compiled, REFERENCE, _keep(self.tokens), sessions)

    def candidate(self, compiled: Compiled) -> Path:
        """Run a backend on the tokens that PyTorch chose; give its dump."""
        self._run(compiled, compiled.backend, _replay(self.tokens))
        return self.folder / compiled.backend

    def _run(
        self,
        compiled: Compiled,
        name: str,
        chooser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sessions: Mapping[str, Session] | None = None,
    ) -> RunResult:
        settings: dict[str, Any] = {}
        if self.generates:
            settings = {
                "max_new_tokens": self.options.max_new_tokens,
                "do_sample": False,
                "num_beams": 1,
                "logits_processor": [chooser],
            }
        return run_compiled(
            compiled,
            self.hooks,
            self.request,
            processor=self.processor,
            settings=settings,
            write_io=True,
            io_folder=self.folder / name,
            io_options=self.options.io,
            sessions=sessions,
        )

    def described(self) -> dict[str, Any]:
        """What was run, as JSON values."""
        request = self.request
        found: dict[str, Any] = {"prompts": [str(prompt) for prompt in request.prompts]}
        for name, value in (request.inputs or {}).items():
            array = np.asarray(value)
            found[name] = array.tolist() if name == "input_ids" else list(array.shape)
        if self.generates:
            found["new_tokens"] = len(self.tokens)
        return found


def _live_sessions(loaded: LoadedModel, hooks: Hooks, export: Export) -> dict[str, Session]:
    """PyTorch on the parts of the model that was loaded."""
    from typing import cast

    from qeff_proxy.backends.torch_backend import TorchSession
    from qeff_proxy.cut import cut_model
    from qeff_proxy.taps import tap_proxy

    cut = cut_model(loaded, hooks, cast("Kind", export.kind), verify=False)
    proxy = tap_proxy(cut.proxy, export.settings.get("taps", ()))
    return {part.name: TorchSession(part) for part in proxy.parts}


def _keep(tokens: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that notes the best token of each step in ``tokens``."""

    def keep(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens.append(scores.argmax(-1))
        return scores

    return keep


def _replay(tokens: Sequence[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that leaves no choice but ``tokens``, one step after another."""
    left = iter(tokens)

    def replay(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = next(left, None)
        if wanted is None or wanted.shape[0] != scores.shape[0]:
            return scores
        only = scores.new_full(scores.shape, -float("inf"))
        return only.scatter(1, wanted[:, None], 0.0)

    return replay


def _options_of(options: VerifyOptions, name: str) -> CompileOptions:
    return replace(options.compile, backend=dict(options.backends.get(name, {})))


def _calibrated(run: _Runs, name: str, progress: Callable[[str], None]) -> CompileOptions:
    """A backend's options, with what it is calibrated on where it can be."""
    from qeff_proxy.calibration import takes_calibration, with_calibration

    chosen = _options_of(run.options, name)
    if not takes_calibration(name):
        return chosen
    given, processor = run.options.calibration, run.processor
    return with_calibration(
        run.export, run.hooks, name, chosen, given, processor=processor, progress=progress
    )


def _is_static(options: VerifyOptions, name: str) -> bool:
    """Whether a backend needs fixed shapes; one that cannot be used says so in its own row."""
    try:
        return is_static(load_backend(name), _options_of(options, name))
    except ProxyError:
        return False


def _tried(run: _Runs, name: str, count: int, progress: Callable[[str], None]) -> BackendResult:
    """What one backend gave, or why it gave nothing."""
    options = run.options
    start = time.perf_counter()
    folder = None
    try:
        progress(f"compiling for {name}")
        chosen = _calibrated(run, name, progress)
        compiled = compile_export(run.export, name, chosen, force=options.force)
        progress(f"running {name}")
        folder = run.candidate(compiled)
        progress(f"comparing {name}")
        reference, candidate = read_dump(run.folder / REFERENCE), read_dump(folder)
        tolerances = replace(
            options.tolerances or Tolerances(), precision=precision_of(load_backend(name), chosen)
        )
        comparison = compare_dumps(reference, candidate, tolerances=tolerances)
        equal, tokens = _equal_tokens(reference, candidate, last_only=run.generates)
        report = _report_path(options.html, name, several=count > 1)
    except ProxyError as error:
        return _failed(name, str(error), folder, start)
    except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
        line = next(iter(str(error).strip().splitlines()), "")
        return _failed(name, f"{type(error).__name__}: {line}", folder, start)
    if report is not None:
        comparison.write_html(report)
    seconds = time.perf_counter() - start
    return BackendResult(name, None, folder, comparison, equal, tokens, seconds, report)


def _failed(name: str, reason: str, folder: Path | None, start: float) -> BackendResult:
    return BackendResult(name, reason, folder, None, 0, 0, time.perf_counter() - start, None)


def _equal_tokens(reference: Dump, candidate: Dump, *, last_only: bool) -> tuple[int, int]:
    """How many tokens, and of how many, the two would choose alike: in each step, or position."""
    equal = count = 0
    prefills = [step for step in reference.steps if step.phase == "prefill"]
    decodes = [step for step in reference.steps if step.phase == "decode"]
    deciding = [*prefills[-1 if last_only else 0 :], *decodes]
    for step in deciding:
        for phase, name in reference.tensors:
            if phase != step.phase or (name.direction, name.tensor) != ("out", "logits"):
                continue
            logits = (d.array(phase, step.index, str(name)) for d in (reference, candidate))
            one, two = (
                (each[..., -1:, :] if last_only else each).astype(np.float32).argmax(-1)
                for each in logits
            )
            equal += int((one == two).sum()) if one.shape == two.shape else 0
            count += one.size
    return equal, count


def _report_path(html: Path | None, name: str, *, several: bool) -> Path | None:
    if html is None or not several:
        return html
    return html.with_name(f"{html.stem}.{name}{html.suffix or '.html'}")
