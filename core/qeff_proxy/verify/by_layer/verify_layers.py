"""Verify a model layer by layer, with one layer in memory at a time.

1. The model is exported with layer taps, as `qeff_proxy.verify.verify_model` does.
2. `calls_of` runs the flow on stand-ins: it tells the inputs of each part in each step. The
   continuation is known beforehand, so that no step needs the logits of the one before.
3. `split_layers` splits a part into a graph per layer. All steps of the run go through a layer
   before the next: first in PyTorch, with this layer's weights (`PartReference`), then on each
   backend, which compiles the layer's graph alone.
4. A backend runs each layer twice: on the reference's inputs, which shows the error that the layer
   adds (local), and on its own results so far (inherited). For one that computes in a lower
   precision so does PyTorch, rounded to it (`LayerFloor`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qeff_proxy.artifact.export_folder import check_weights_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.compile_export import fixed_lengths
from qeff_proxy.backends.recipe import check_recipe, name_units_of
from qeff_proxy.common.file_errors import reading
from qeff_proxy.common.notebook import in_notebooks
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer.calls import Outputs, calls_of, check_alone, job_of
from qeff_proxy.verify.by_layer.candidate import Candidate, remove_leftovers
from qeff_proxy.verify.by_layer.floor import LayerFloor
from qeff_proxy.verify.by_layer.journal import REFERENCE, Entry, Journal
from qeff_proxy.verify.by_layer.part_run import PartRun, Step
from qeff_proxy.verify.by_layer.report import write_layer_reports
from qeff_proxy.verify.by_layer.results import (
    LayerVerification,
    layer_name,
    output_names,
)
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.runs import (
    check_request,
    complete_request,
    described_request,
    processor_in,
)
from qeff_proxy.verify.verify_backend import check_uncalibrated, needs_fixed_shapes
from qeff_proxy.verify.verify_model import check_names, export_of, installed_hooks, opened

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LayerRun:
    """One layer that has run.

    Attributes:
        graph: The layer.
        reference: The reference's run of its part, before this layer.
        expected: The reference's outputs of the layer, in each call.
        following: The layers after it.
        floor: The noise floor of the backend's precision; ``None`` where there is none.
        module: The part in PyTorch.
    """

    graph: LayerGraph
    reference: PartRun
    expected: Sequence[Step]
    following: Sequence[LayerGraph]
    floor: LayerFloor | None
    module: nn.Module


#: Gets a layer, the backend that ran it, and that backend as it was before. What it returns runs
#: the layers that follow, beside the backends.
Observer = Callable[[LayerRun, Candidate, Candidate], Sequence[Candidate]]
#: Gets the name and the number of each layer, before the first runs.
Listed = Callable[[Sequence[tuple[str, int | None]]], None]


@in_notebooks("verifying layer by layer")
def verify_layers(
    model: str | Path | LoadedModel | Export,
    backends: Sequence[str] = ("onnxruntime",),
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
    observe: Observer | None = None,
    listed: Listed = lambda _layers: None,
) -> LayerVerification:
    """Run a model on several backends, and compare each of its layers with PyTorch.

    Args:
        model: A checkpoint: folder, hub id, or loaded.
        backends: Their names.
        request: The input; by default the flow's example.
        options: Which export, input and tolerances; of the prompt, ``max_new_tokens`` tokens are
            the continuation, again from its start.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts; a notebook shows it by default.
        observe: As for `verify_layers_of`.
        listed: As for `verify_layers_of`.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        UnsupportedModelError: The model cannot be run layer by layer.
        BackendError: None of the backends can be used.
    """
    options = replace(options or VerifyOptions(), taps="layers")
    names = tuple(dict.fromkeys(backends))
    check_names(names, options)
    for name in names:
        check_uncalibrated(options, name)
    if options.html is not None:
        check_report_place(options.html)
    if "torch" in names:
        raise UsageError("PyTorch is the reference", "Name another backend.")
    model = opened(model, trust_remote_code)
    if isinstance(model, Export):
        raise UsageError(
            "an export cannot be verified layer by layer", "Name the checkpoint that it is of."
        )
    hooks = hooks or installed_hooks(model)
    request, tensors = check_request(request, model, hooks, trust_remote_code)
    export = export_of(model, hooks, options, progress)
    return verify_layers_of(
        export, model, names, (request, tensors), options, hooks, progress, observe, listed
    )


def verify_layers_of(
    export: Export,
    model: LoadedModel,
    backends: Sequence[str],
    given: tuple[Request | None, Mapping[str, torch.Tensor] | None],
    options: VerifyOptions,
    hooks: Hooks,
    progress: Callable[[str], None] = lambda _stage: None,
    observe: Observer | None = None,
    listed: Listed = lambda _layers: None,
) -> LayerVerification:
    """Verify an export by layer, against the checkpoint that it was made from.

    Args:
        export: With layer taps.
        model: The checkpoint.
        backends: Their names.
        given: The request and its tensors; ``None`` for the flow's example.
        options: As for `verify_layers`.
        hooks: Of its model type.
        progress: Called with the name of each stage as it starts.
        observe: Sees each layer after each backend has run it. A run with one begins anew.
        listed: Sees which layers there are, before the first runs.

    Returns:
        The errors of the layers; of those that ran before Ctrl-C or a full disk, if there are any.
        The next run of the same goes on there.

    Raises:
        ArtifactError: The export cannot be written to, and no layer ran before.
    """
    import torch

    from qeff_proxy.verify.by_layer.reference import PartReference, reference_parts
    from qeff_proxy.verify.rounding import BITS

    if any(needs_fixed_shapes(options, name) for name in backends):
        options = replace(options, compile=fixed_lengths(export, options.compile))
    proxy, weights = reference_parts(model, hooks, export)
    processor = processor_in(export.processor_folder, model.trust_remote_code)
    request, tensors = complete_request(export, *given, hooks, processor, lambda: proxy)
    if options.tolerances is not None:
        options.tolerances.check_used(output_names(export))
    check_weights_of(export)
    remove_leftovers(export.folder)
    recipes = [check_recipe(export, name, options.compile_for(name)) for name in backends]
    own_process = observe is not None
    candidates = [Candidate(one, export, options, own_process=own_process) for one in backends]
    precisions = {candidate.precision for candidate in candidates if export.dtype == "float32"}
    floors = {name: LayerFloor(bits) for name, bits in BITS.items() if name in precisions}
    known: dict[str, Outputs] = {}
    steps: dict[str, None] = {}
    where, interrupted, failure, resumed = "", None, None, None
    settings = [candidate.settings() for candidate in candidates]
    settings += [recipes, options.max_new_tokens, options.tolerances, torch.__version__]
    settings.append(options.piece)
    journal = Journal.of(export, tensors, settings)
    parts = [(part, _split(export, part, progress)) for part in export.parts]
    listed([(layer_name(p.name, one.layer), one.layer) for p, graphs in parts for one in graphs])
    first, end = _piece(options.piece, sum(len(graphs) for _, graphs in parts))
    number = 0
    with journal.held(anew=options.force or observe is not None):
        try:
            for part, graphs in parts:
                if number >= end:
                    break
                run = PartRun(part, calls_of(job_of(export, options, tensors), part.name, known))
                steps.update(dict.fromkeys(call.step for call in run.calls))
                others: dict[str, Candidate | LayerFloor] = {c.name: c for c in candidates}
                others |= {f"floor {name}": floor for name, floor in floors.items()}
                beginning: list[Candidate | LayerFloor] = [*candidates, *floors.values()]
                for other in beginning:
                    other.begin(part, job_of(export, options, tensors))
                module = proxy.part(part.name).module
                live = PartReference(proxy.part(part.name), weights)
                for stage, graph in enumerate(graphs[: end - number]):
                    number += 1
                    check_alone(part, graph, stage)
                    where = layer_name(part.name, graph.layer)
                    following = graphs[stage + 1 :]
                    earlier = journal.read(f"{part.name}-{stage:04d}")
                    if earlier is not None:
                        resumed = where
                        run.keep(earlier.values[REFERENCE], following)
                        for name, other in others.items():
                            other.restore(earlier.values[name], earlier.states[name], following)
                        continue
                    progress(f"{where}: PyTorch")
                    names = {spec.name for spec in graph.outputs}
                    run_layer = partial(live.run, stage=stage, names=names)
                    with live.open():
                        expected = run.forward(graph, run_layer, whole=True)
                        if number <= first:  # a layer of an earlier piece
                            kept = run.keep(expected, following)
                            for other in others.values():
                                state: Any = other.state()
                                other.restore(kept, state, following)
                            continue
                        by_step = run.by_step(expected)
                        for floor in floors.values():
                            rounded = partial(run_layer, bits=floor.bits)
                            floor.run_layer(graph, run, by_step, following, rounded)
                    for candidate in tuple(candidates):
                        progress(f"{where}: {candidate.name}")
                        floor_of_it = floors.get(candidate.precision or "")
                        before = candidate.fork() if observe is not None else candidate
                        candidate.try_layer(graph, run, expected, following, floor_of_it)
                        if observe is not None:
                            layer = LayerRun(graph, run, expected, following, floor_of_it, module)
                            candidates += observe(layer, candidate, before)
                    values = {REFERENCE: run.keep(expected, following)}
                    if observe is None:
                        values |= {name: other.kept for name, other in others.items()}
                        states = {name: other.state() for name, other in others.items()}
                        journal.write(f"{part.name}-{stage:04d}", Entry(values, states))
                    gc.collect(1)  # graphs are cycles, which hold arrays of the layer's size
                known[part.name] = run.outputs()
            journal.remove()
        except (KeyboardInterrupt, ArtifactError) as error:
            if not any(candidate.result().layers for candidate in candidates):
                raise
            interrupted = where
            failure = error if isinstance(error, ArtifactError) else None
        finally:
            for candidate in candidates:
                candidate.close()
    results = tuple(candidate.result() for candidate in candidates)
    done = LayerVerification(
        export.model["source"], export.folder, tuple(steps), results, interrupted, failure, resumed
    )
    return write_layer_reports(done, export, options, described_request(request))


def _split(export: Export, part: ExportedPart, progress: Callable[[str], None]) -> list[LayerGraph]:
    """The graph of each layer of a part."""
    progress(f"splitting {part.name}")
    with reading(export.folder):
        whole = ir.load(export.folder / part.file)
    name_units_of(whole, export, part)
    return split_layers(whole, part.inputs, part.outputs)


def _piece(piece: tuple[int, int], layers: int) -> tuple[int, int]:
    """The first layer of a piece, and the one after its last."""
    index, pieces = piece
    if not 1 <= index <= pieces:
        raise UsageError(f"there is no piece {index} of {pieces}", "They count from 1.")
    if pieces > layers:
        raise UsageError(
            f"the {layers} layers cannot be split into {pieces} pieces", "Make fewer of them."
        )
    return (index - 1) * layers // pieces, index * layers // pieces
