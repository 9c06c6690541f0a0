"""Get a model ready for runs in which some of it is in a lower precision."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qeff_proxy.artifact.export_folder import check_weights_of
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.onnxruntime.options import WeightOptions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.precision.run_variants import Variants
from qeff_proxy.precision.simulate import PRECISIONS, Simulation
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer.calls import job_of
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.runs import (
    check_request,
    complete_request,
    described_request,
    processor_in,
)
from qeff_proxy.verify.verify_model import (
    check_names,
    export_of,
    installed_hooks,
    live_proxy,
    opened,
)

#: Those of the precisions whose numbers are those of ONNX Runtime's own kernels.
_REAL = ("int8", "int4")


@dataclass(frozen=True)
class Prepared:
    """A model, ready.

    Attributes:
        export: With the output of each layer.
        model: The checkpoint, or the export.
        hooks: Of its model type.
        request: The input.
        tensors: Its tensors.
        options: With the options of the backend that choose the precision.
        variants: Runs it.
        described: The input, as JSON values.
        how: What is simulated, in words.
    """

    export: Export
    model: LoadedModel | Export
    hooks: Hooks
    request: Request
    tensors: Mapping[str, torch.Tensor]
    options: VerifyOptions
    variants: Variants
    described: Mapping[str, Any]
    how: str


def prepare(
    model: str | Path | LoadedModel | Export,
    backend: str,
    precision: str,
    request: Request | None,
    options: VerifyOptions | None,
    hooks: Hooks | None,
    *,
    trust_remote_code: bool,
    progress: Callable[[str], None],
) -> Prepared:
    """Export a model and make its input; see `measure_sensitivity` for the arguments.

    Raises:
        UsageError: The backend lacks the precision, the options contradict it, or the input cannot
            be right.
        UnsupportedModelError: It is not in float32, or the precision changes nothing of it.
    """
    options = replace(options or VerifyOptions(), taps="layers")
    check_names([backend], options)
    options = with_precision(options, backend, precision)
    model = opened(model, trust_remote_code)
    loaded = model if isinstance(model, LoadedModel) else None
    reads_it = loaded is not None and not loaded.is_read
    hooks = hooks or installed_hooks(model)
    given = check_request(request, model, hooks, trust_remote_code)
    export = export_of(model, hooks, options, progress)
    if export.dtype != "float32" or export.kind == "stub":
        raise UnsupportedModelError(
            f"a precision is measured against float32, and the export is {export.dtype} "
            f"({export.kind})",
            "Export in float32, split or whole.",
        )
    check_weights_of(export)
    processor = processor_in(export.processor_folder, trust_remote_code)

    def live() -> Any:
        return live_proxy(loaded, hooks, export)

    request, tensors = complete_request(export, *given, hooks, processor, live)
    if loaded is not None and reads_it:
        loaded.forget()  # its weights are mapped otherwise, beside the export's
        gc.collect()  # modules are cycles
    variants = Variants(
        export,
        _simulation(backend, precision, options),
        job_of(export, replace(options, max_new_tokens=1), tensors),
        progress,
    )
    if not variants.units:
        raise UnsupportedModelError(
            f"{backend} computes nothing of {export.model['source']} in {precision}",
            "Choose another precision.",
        )
    how = (
        f"ONNX Runtime's own {precision} products, all else in float32"
        if precision in _REAL
        else f"{precision} simulated by rounding what operators read and give, all else in float32"
    )
    described = described_request(request)
    return Prepared(export, model, hooks, request, tensors, options, variants, described, how)


def with_precision(options: VerifyOptions, backend: str, precision: str) -> VerifyOptions:
    """The options with those of the backend that choose a precision.

    Raises:
        UsageError: It has no such precision, or the options say another.
    """
    implementation = load_backend(backend)
    wanted = implementation.precisions.get(precision)
    if wanted is None:
        has = ", ".join(implementation.precisions) or "none"
        raise UsageError(f"{backend} has no precision {precision!r}", f"It has: {has}.")
    given = options.backends.get(backend, {})
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"-O {backend}.{name}={given[name]} is not {precision}", "Leave one of them out."
            )
    merged = {**options.backends, backend: {**given, **wanted}}
    chosen = replace(options, backends=merged)
    check = {n: v for n, v in merged[backend].items() if n not in wanted}
    implementation.check_options(backend, replace(chosen.compile, backend=check))
    return chosen


def _simulation(backend: str, precision: str, options: VerifyOptions) -> Simulation:
    if precision not in PRECISIONS:
        raise UsageError(f"{precision} is not simulated", f"There are {', '.join(PRECISIONS)}.")
    implementation, chosen = load_backend(backend), options.compile_for(backend)
    return Simulation(
        precision,
        lambda part: implementation.lowers(part, chosen),
        lambda part: WeightOptions.of(part, chosen.backend),
    )
