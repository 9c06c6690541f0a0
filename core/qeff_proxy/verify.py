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
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qeff_proxy.artifact import Export, find_export
from qeff_proxy.backends import CompileOptions, is_static, load_backend, precision_of
from qeff_proxy.checkpoint import folder_named
from qeff_proxy.compare import Tolerances, compare_dumps
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.compile import Compiled, compile_export, fixed_lengths
from qeff_proxy.dump import DumpOptions, read_dump
from qeff_proxy.errors import ProxyError, UsageError
from qeff_proxy.example import DEFAULT_PROMPT, example_request
from qeff_proxy.forced import count_equal_tokens, keep_tokens, replay_tokens
from qeff_proxy.load import LoadedModel, load_model
from qeff_proxy.run import RunResult, check_io_folder, new_run_name, run_compiled
from qeff_proxy.taps import normalize_taps
from qeff_proxy.verification import BackendResult, Verification
from qeff_proxy.verify_input import check_request, describe_given, processor_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from qeff_proxy.parts import Kind, Proxy
    from qeff_proxy.plugin_hooks import Hooks
    from qeff_proxy.request import Request
    from qeff_proxy.session import Session

__all__ = ["DEFAULT_PROMPT", "REFERENCE", "VerifyOptions", "verify_model"]

#: The folder of the reference's dump, beside those of the backends.
REFERENCE = "reference"
_STUB = "a stub's outputs mean nothing, so there is nothing to verify"


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
        request: The input; by default what the model's flow gives as an example
            (`qeff_proxy.example.example_request`): a line of text, a recording of speech, a
            drawing and a question, or random numbers where there is no processor for these.
        options: How.
        hooks: Of its model type, where the installed plugins are not meant.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Told what happens as it begins.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        BackendError: None of the backends can be used.
        ProxyError: The model cannot be loaded, cut, exported or run by PyTorch. What fails on a
            backend is no exception but stands in its result.
    """
    options = options or VerifyOptions()
    names = tuple(dict.fromkeys(backends))
    _check_names(names, options)
    if options.io_folder is not None:
        check_io_folder(options.io_folder / REFERENCE)
    if options.html is not None:
        check_report_place(options.html)
    if isinstance(model, str | Path):
        model = _opened(folder_named(str(model)), str(model), trust_remote_code)
    hooks = hooks or _installed_hooks(model)
    loaded = model if isinstance(model, LoadedModel) else None
    if request is not None:
        request = check_request(request, model, hooks, trust_remote_code)
    export = _export_of(model, hooks, options, progress)
    if export.kind == "stub":
        raise UsageError(_STUB, "Export with proxy='split' to verify.")
    if any(_is_static(options, name) for name in names):
        # Every run has the same chunks and lengths then, so that its steps can be compared.
        options = replace(options, compile=fixed_lengths(export, options.compile))
    processor = processor_in(export.processor_folder, trust_remote_code)
    live = cache(partial(_live_proxy, loaded, hooks, export))
    if request is None:
        request = example_request(export, processor, live)
    run = _Runs(export, hooks, request, processor, options)
    progress("running PyTorch, the reference")
    reference = run.reference(live() if loaded is not None else None)
    if options.tolerances is not None:
        options.tolerances.check_used(read_dump(run.folder / REFERENCE).names())
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
    return find_export(folder) or load_model(source, trust_remote_code=trust_remote_code)


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


def _check_names(names: Sequence[str], options: VerifyOptions) -> None:
    """Refuse what leaves nothing to verify."""
    if not names:
        raise UsageError("no backend is named", "Name one or several, such as onnxruntime.")
    if options.kind == "stub":
        raise UsageError(_STUB, "Verify the split proxy, or the whole model.")
    missing = []
    for name in names:
        try:
            load_backend(name)
        except ProxyError as error:
            missing.append(error)
    if len(missing) == len(names):
        raise missing[0]


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

    def reference(self, live: Proxy | None) -> RunResult:
        """Run PyTorch, on live parts or on the export's, and keep the tokens that it chose."""
        compiled = compile_export(self.export, "torch", self.options.compile)
        sessions = None
        if live is not None:
            from qeff_proxy.backends.torch_backend import TorchSession

            sessions = {part.name: TorchSession(part) for part in live.parts}
        return self._run(compiled, REFERENCE, keep_tokens(self.tokens), sessions)

    def candidate(self, compiled: Compiled) -> Path:
        """Run a backend on the tokens that PyTorch chose; give its dump."""
        self._run(compiled, compiled.backend, replay_tokens(self.tokens))
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
        for kind in ("audio", "images"):
            if given := getattr(request, kind):
                found[kind] = [describe_given(one) for one in given]
        for name, value in (request.inputs or {}).items():
            array = np.asarray(value)
            found[name] = array.tolist() if name == "input_ids" else list(array.shape)
        if self.generates:
            found["new_tokens"] = len(self.tokens)
        return found


def _live_proxy(loaded: LoadedModel | None, hooks: Hooks, export: Export) -> Proxy:
    """The parts with PyTorch's modules: of the model that was loaded, else of the export."""
    if loaded is None:
        from qeff_proxy.backends.torch_backend import proxy_of_export

        return proxy_of_export(export, hooks)
    from qeff_proxy.cut import cut_model
    from qeff_proxy.taps import tap_proxy

    cut = cut_model(loaded, hooks, cast("Kind", export.kind), verify=False)
    return tap_proxy(cut.proxy, export.settings.get("taps", ()))


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
        equal, tokens = count_equal_tokens(reference, candidate, generates=run.generates)
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


def _report_path(html: Path | None, name: str, *, several: bool) -> Path | None:
    if html is None or not several:
        return html
    return html.with_name(f"{html.stem}.{name}{html.suffix or '.html'}")
