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

import fcntl
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from qeff_proxy.artifact.export_folder import check_weights_of
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.compile_export import fixed_lengths
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.compare.tolerances import COMPUTED_IN, Tolerances
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ProxyError, UsageError
from qeff_proxy.flows.flow import Job
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.load.checkpoint_files import folder_named
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.example_request import example_request
from qeff_proxy.session.session import Session
from qeff_proxy.verify.by_layer.calls import Outputs, calls_of, check_alone, job_of
from qeff_proxy.verify.by_layer.floor import LayerFloor
from qeff_proxy.verify.by_layer.part_run import PartRun, Step
from qeff_proxy.verify.by_layer.reference import PartReference, reference_parts
from qeff_proxy.verify.by_layer.report import write_layer_reports
from qeff_proxy.verify.by_layer.results import (
    BackendLayers,
    LayerResult,
    LayerVerification,
    compare_alike,
    compare_layer,
    layer_name,
)
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.results import reason_of
from qeff_proxy.verify.rounding import BITS
from qeff_proxy.verify.runs import check_request, described_request, processor_in, tensors_of
from qeff_proxy.verify.verify_backend import needs_fixed_shapes
from qeff_proxy.verify.verify_model import check_names, export_of, installed_hooks, opened


def verify_layers(
    model: str | Path | LoadedModel | Export,
    backends: Sequence[str] = ("onnxruntime",),
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
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
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        UnsupportedModelError: The model cannot be run layer by layer.
        BackendError: None of the backends can be used.
    """
    options = replace(options or VerifyOptions(), taps="layers")
    names = tuple(dict.fromkeys(backends))
    check_names(names, options)
    if options.html is not None:
        check_report_place(options.html)
    if "torch" in names:
        raise UsageError("PyTorch is the reference", "Name another backend.")
    if isinstance(model, str | Path):
        model = opened(folder_named(str(model)), str(model), trust_remote_code)
    if isinstance(model, Export):
        raise UsageError(
            "an export cannot be verified layer by layer", "Name the checkpoint that it is of."
        )
    hooks = hooks or installed_hooks(model)
    tensors = None
    if request is not None:
        request, tensors = check_request(request, model, hooks, trust_remote_code)
    export = export_of(model, hooks, options, progress)
    return verify_layers_of(export, model, names, (request, tensors), options, hooks, progress)


def verify_layers_of(
    export: Export,
    model: LoadedModel,
    backends: Sequence[str],
    given: tuple[Request | None, Mapping[str, torch.Tensor] | None],
    options: VerifyOptions,
    hooks: Hooks,
    progress: Callable[[str], None] = lambda _stage: None,
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

    Returns:
        The errors of the layers; of those that ran before Ctrl-C, if there are any.
    """
    if any(needs_fixed_shapes(options, name) for name in backends):
        options = replace(options, compile=fixed_lengths(export, options.compile))
    proxy, weights = reference_parts(model, hooks, export)
    processor = processor_in(export.processor_folder, model.trust_remote_code)
    request, tensors = given
    if tensors is None:
        request = example_request(export, processor, lambda: proxy)
        defaults = export.settings.get("request_options", {})
        tensors = tensors_of(request.with_defaults(defaults), hooks, processor)
    check_weights_of(export)
    remove_leftovers(export.folder)
    candidates = [_Candidate(name, export, options) for name in backends]
    precisions = {candidate.precision for candidate in candidates if export.dtype == "float32"}
    floors = {name: LayerFloor(bits) for name, bits in BITS.items() if name in precisions}
    known: dict[str, Outputs] = {}
    steps: dict[str, None] = {}
    where, interrupted = "", None
    try:
        for part in export.parts:
            progress(f"splitting {part.name}")
            whole = ir.load(export.folder / part.file)
            graphs = split_layers(whole, part.inputs, part.outputs)
            run = PartRun(part, calls_of(job_of(export, options, tensors), part.name, known))
            steps.update(dict.fromkeys(call.step for call in run.calls))
            for candidate in candidates:
                candidate.begin(part, job_of(export, options, tensors))
            for floor in floors.values():
                floor.begin(part, job_of(export, options, tensors))
            live = PartReference(proxy.part(part.name), weights)
            for stage, graph in enumerate(graphs):
                check_alone(part, graph, stage)
                where = layer_name(part.name, graph.layer)
                progress(f"{where}: PyTorch")
                names = {spec.name for spec in graph.outputs}
                run_layer = partial(live.run, stage=stage, names=names)
                with live.open():
                    expected = run.forward(graph, run_layer, whole=True)
                    by_step = run.by_step(expected)
                    for floor in floors.values():
                        rounded = partial(run_layer, bits=floor.bits)
                        floor.run_layer(graph, run, by_step, graphs[stage + 1 :], rounded)
                for candidate in candidates:
                    progress(f"{where}: {candidate.name}")
                    floor_of_it = floors.get(candidate.precision or "")
                    candidate.try_layer(graph, run, expected, graphs[stage + 1 :], floor_of_it)
                run.keep(expected, graphs[stage + 1 :])
                gc.collect(1)  # graphs are cycles, which hold arrays of the layer's size
            known[part.name] = run.outputs()
    except KeyboardInterrupt:
        if not any(candidate.result().layers for candidate in candidates):
            raise
        interrupted = where
    results = tuple(candidate.result() for candidate in candidates)
    source = export.model["source"]
    done = LayerVerification(source, export.folder, tuple(steps), results, interrupted)
    return write_layer_reports(done, export, options, described_request(request or Request()))


class _Candidate:
    """One backend; after its first error it runs no more.

    Args:
        name: The backend's name.
        export: The export.
        options: Of the verification.
    """

    def __init__(self, name: str, export: Export, options: VerifyOptions) -> None:
        self.name = name
        self._export = export
        self._options = options.compile_for(name)
        self._tolerances = options.tolerances or Tolerances()
        self._known: dict[str, Outputs] = {}
        self._run: PartRun | None = None
        self._layers: list[LayerResult] = []
        self._error: str | None = None
        self._note: str | None = None
        try:
            self.precision = load_backend(name).precision(self._options)
        except ProxyError:  # its first layer will say so
            self.precision = None

    def begin(self, part: ExportedPart, job: Job) -> None:
        """Begin a part, with the outputs of the parts before it as this backend computed them."""
        if self._run is not None:
            self._known[self._run.part.name] = self._run.outputs()
        if self._error is None:
            self._run = PartRun(part, calls_of(job, part.name, self._known))

    def try_layer(
        self,
        graph: LayerGraph,
        reference: PartRun,
        expected: Sequence[Step],
        following: Sequence[LayerGraph],
        floor: LayerFloor | None,
    ) -> None:
        """Run a layer on the reference's inputs, then on the backend's own; compare both."""
        if self._error is not None:
            return
        assert self._run is not None  # noqa: S101 (see `begin`)
        part = reference.part
        try:
            with _layer_session(self.name, self._export, part, graph, self._options) as session:
                local = reference.forward(graph, session.run, cache=expected)
                inherited = self._run.forward(graph, session.run)
        except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
            self._error = f"{layer_name(part.name, graph.layer)}: {reason_of(error)}"
            return
        if self.precision in COMPUTED_IN:
            self._note = f"there is none of {self.precision}" if floor is None else floor.failure
        tolerances = replace(self._tolerances, precision=self.precision)
        wanted = reference.by_step(expected)
        errors = (
            compare_layer(
                wanted, reference.by_step(one), part.name, replace(tolerances, floors=floors)
            )
            for one, floors in (
                (local, floor.local if floor is not None else {}),
                (inherited, floor.inherited if floor is not None else {}),
            )
        )
        self._layers.append(LayerResult(part.name, graph.layer, *errors))
        self._run.keep(inherited, following)

    def result(self) -> BackendLayers:
        """The layers that ran."""
        return BackendLayers(self.name, compare_alike(self._layers), self._error, self._note)


def remove_leftovers(folder: Path) -> None:
    """Remove the layers that killed runs left in an export; those of other runs are locked."""
    for graph in folder.glob(".layer-*.onnx"):
        with suppress(BlockingIOError, FileNotFoundError), graph.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(graph.with_suffix(".files"), ignore_errors=True)
            graph.unlink()


@contextmanager
def _layer_session(
    name: str, export: Export, part: ExportedPart, graph: LayerGraph, options: CompileOptions
) -> Iterator[Session]:
    """Compile a layer alone, and open it; its files are removed at the end.

    Its graph lies beside the weights file, which it points into: external data may lie nowhere
    else.
    """
    with ExitStack() as stack:
        file = stack.enter_context(
            tempfile.NamedTemporaryFile(dir=export.folder, prefix=".layer-", suffix=".onnx")
        )
        fcntl.flock(file, fcntl.LOCK_EX)  # see `remove_leftovers`
        path = Path(file.name)
        ir.save(graph.model, path)
        layer = replace(
            part,
            file=path.name,
            sha256=sha256_of(path),
            inputs=graph.inputs,
            outputs=graph.outputs,
            masks=tuple(mask for mask in part.masks if mask.name in {i.name for i in graph.inputs}),
        )
        alone = replace(export, parts=(layer,))
        folder = path.with_suffix(".files")
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        backend = load_backend(name)
        backend.check_options(name, options)
        session = backend.open_once(alone, layer, options, folder)
        stack.callback(session.close)
        yield session
