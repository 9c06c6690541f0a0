"""Verify: run a model on several backends, and compare each with PyTorch.

1. The model is exported with layer taps; an export is used unchanged.
2. PyTorch runs the parts on a real input: the reference. For a checkpoint it runs the model that
   was loaded, so that the exported weights are verified too; for an export, its own weights.
3. Each backend compiles the export and runs the same input. It is **fed the reference's tokens**,
   whichever it would have chosen, so that every step has the same inputs and can be compared.
4. Each dump is compared with the reference's (`qeff_proxy.compare`). For a backend that computes
   in a lower precision, PyTorch runs once more with the rounding of that (`Runs.measure_floor`):
   its errors, the noise floor, decide how far the backend may be off.
5. On request, speed is measured (`qeff_proxy.verify.measure_speed`) and the quickest named.

A failure on one backend is reported in its row, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qeff_proxy.artifact.export_folder import check_weights_of, find_export
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import fixed_lengths
from qeff_proxy.backends.recipe import check_recipe
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.notebook import in_notebooks
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.dump import DumpOptions, read_dump
from qeff_proxy.errors import ProxyError, UsageError
from qeff_proxy.load.checkpoint_files import folder_named
from qeff_proxy.load.load_model import LoadedModel, flow_of, load_model
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import check_io_folder
from qeff_proxy.verify.options import BEST, VerifyOptions
from qeff_proxy.verify.results import Verification
from qeff_proxy.verify.runs import REFERENCE, Runs, check_request, complete_request, processor_in
from qeff_proxy.verify.verify_backend import (
    backends_to_choose_from,
    needs_fixed_shapes,
    precisions_of,
    try_backend,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_proxy.verify.results import BackendResult
    from qeff_proxy.verify.timing import Speed

_STUB = "a stub's outputs mean nothing, so there is nothing to verify"


@in_notebooks("verifying")
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
    """Run a model on several backends and compare every tensor with PyTorch.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export (its folder, or read).
        backends: Their names. ``"best"`` stands for all whose speed can be measured on this
            machine, and has it measured.
        request: The input; by default the flow's example (`qeff_proxy.run.example_request`): a
            line of text, a recording of speech, a drawing and a question, or random numbers where
            there is no processor for these.
        options: How to verify.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts; a notebook shows it by default.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        BackendError: None of the backends can be used.
        ProxyError: The model cannot be loaded, cut, exported or run by PyTorch. A failure of a
            backend is not raised but kept in its result.
    """
    options = options or VerifyOptions()
    names, left_out = _names_of(backends, options)
    options = replace(options, speed=options.speed or BEST in backends)
    check_names(names, options)
    _check_places(options)
    model = opened(model, trust_remote_code)
    hooks = hooks or installed_hooks(model)
    loaded = model if isinstance(model, LoadedModel) else None
    reads_it = loaded is not None and not loaded.is_read
    request, tensors = check_request(request, model, hooks, trust_remote_code)
    export = export_of(model, hooks, options, progress)
    if export.kind == "stub":
        raise UsageError(_STUB, "Export with proxy='split' to verify.")
    for name in names:
        check_recipe(export, name, options.compile_for(name))
    progress("checking the export's weights")  # only the first compile does
    check_weights_of(export)
    plain = _without_taps(loaded, hooks, export, options, progress)
    if any(needs_fixed_shapes(options, name) for name in names):
        # Every run has the same chunks and lengths then, so that its steps can be compared.
        options = replace(options, compile=fixed_lengths(export, options.compile))
    processor = processor_in(export.processor_folder, trust_remote_code)
    live = cache(partial(live_proxy, loaded, hooks, export))
    request, tensors = complete_request(export, request, tensors, hooks, processor, live)
    run = Runs(export, hooks, request, tensors, processor, options)
    progress("running PyTorch, the reference")
    reference = run.reference(live() if loaded is not None else None)
    for precision in precisions_of(run, names):
        progress(f"running PyTorch in {precision}, the noise floor")
        run.measure_floor(live(), precision)
    live.cache_clear()
    if loaded is not None and reads_it:
        loaded.forget()  # before a backend holds the weights a second time
    if options.tolerances is not None:
        options.tolerances.check_used(read_dump(run.folder / REFERENCE).names())
    results = tuple(try_backend(run, name, progress, several=len(names) > 1) for name in names)
    return Verification(
        source=export.model["source"],
        export=export.folder,
        taps=tuple(export.settings.get("taps", ())),
        reference=run.folder / REFERENCE,
        weights="checkpoint" if loaded is not None else "export",
        input=run.described(),
        decoded=reference.decoded,
        results=results,
        speed=_speed_of(run, loaded, plain, results, left_out, progress),
        idle=_idle_parts(export, run),
    )


def _names_of(
    backends: Sequence[str], options: VerifyOptions
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The named backends, each once, and those that ``best`` leaves out, with the reason."""
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    for name in backends:
        if name == BEST:
            timed, left_out = backends_to_choose_from(options.compile_for)
            chosen += timed
        else:
            chosen.append(name)
    names = tuple(dict.fromkeys(chosen))
    return names, {name: why for name, why in left_out.items() if name not in names}


def opened(
    model: str | Path | LoadedModel | Export, trust_remote_code: bool
) -> LoadedModel | Export:
    """The export in the folder that the user named, else the checkpoint of that name."""
    if not isinstance(model, str | Path):
        return model
    found = find_export(folder_named(str(model)))
    return found or load_model(str(model), trust_remote_code=trust_remote_code)


def installed_hooks(model: LoadedModel | Export) -> Hooks:
    """The hooks of the installed plugin for a model."""
    from qeff_proxy.plugins.manager import Plugins

    if isinstance(model, LoadedModel):
        return Plugins.discover().hooks_for(model.model_type, task=flow_of(model))
    return Plugins.discover().hooks_for(model.model["model_type"], task=model.flow)


def export_of(
    model: LoadedModel | Export,
    hooks: Hooks,
    options: VerifyOptions,
    progress: Callable[[str], None],
) -> Export:
    """Export a checkpoint with the taps asked for; an export must have them already."""
    if isinstance(model, Export):
        from qeff_proxy.layers.taps import normalize_taps

        has = tuple(model.settings.get("taps", ()))
        if options.taps is not None and (asked := normalize_taps(options.taps)) != has:
            raise UsageError(
                f"the export {model.folder} has the taps {', '.join(has) or 'none'}, not "
                f"{', '.join(asked) or 'none'}",
                "Name the checkpoint, to export it with other taps.",
            )
        return model
    from qeff_proxy.export.export_model import export_model

    return export_model(
        model,
        hooks,
        options.kind,
        output=options.output,
        opset=options.opset,
        weights=options.weights,
        taps="layers" if options.taps is None else options.taps,
        force=options.force,
        wait=options.wait,
        progress=progress,
    )


def _idle_parts(export: Export, run: Runs) -> tuple[str, ...]:
    """The parts that did not run on this input, such as a vision part without an image."""
    if run.options.io != DumpOptions():  # a part may be left out of the dump on purpose
        return ()
    ran = read_dump(run.folder / REFERENCE).manifest.parts
    return tuple(part.name for part in export.parts if part.name not in ran)


def _without_taps(
    loaded: LoadedModel | None,
    hooks: Hooks,
    export: Export,
    options: VerifyOptions,
    progress: Callable[[str], None],
) -> Export:
    """The export whose speed is measured: without taps, unless an export with taps was named."""
    if not options.speed or loaded is None or not export.settings.get("taps"):
        return export
    from qeff_proxy.export.export_model import export_model

    return export_model(
        loaded,
        hooks,
        options.kind,
        opset=options.opset,
        weights=options.weights,
        force=options.force,
        progress=progress,
    )


def _uncut(loaded: LoadedModel | None, export: Export) -> PreTrainedModel:
    """The uncut model in PyTorch: the loaded checkpoint's, else the export's."""
    if loaded is not None:
        return loaded.model
    from qeff_proxy.backends.torch.backend import model_of_export

    return model_of_export(export)


def _speed_of(
    run: Runs,
    loaded: LoadedModel | None,
    plain: Export,
    results: Sequence[BackendResult],
    left_out: Mapping[str, str],
    progress: Callable[[str], None],
) -> Speed | None:
    """The speed of the backends; ``None`` where it was not asked for."""
    if not run.options.speed:
        return None
    from qeff_proxy.verify.measure_speed import measure_speed

    uncut = partial(_uncut, loaded, run.export)
    return measure_speed(run, plain, uncut, results, left_out, progress)


def _check_places(options: VerifyOptions) -> None:
    """Refuse places where dumps and reports cannot go."""
    if options.io_folder is not None:
        check_io_folder(options.io_folder / REFERENCE)
    if options.html is not None:
        check_report_place(options.html)


def check_names(names: Sequence[str], options: VerifyOptions) -> None:
    """Refuse backends or options that leave nothing to verify."""
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


def live_proxy(loaded: LoadedModel | None, hooks: Hooks, export: Export) -> Proxy:
    """The parts as PyTorch modules: of the loaded checkpoint, else of the export."""
    if loaded is None:
        from qeff_proxy.backends.torch.backend import proxy_of_export

        return proxy_of_export(export, hooks)
    from qeff_proxy.cut.cut_model import cut_model
    from qeff_proxy.layers.taps import tap_proxy

    cut = cut_model(loaded, hooks, cast("Kind", export.kind), verify=False)
    return tap_proxy(cut.proxy, export.settings.get("taps", ()))
