"""Export: from a loaded model to a folder of ONNX parts.

1. `qeff_proxy.export.model_graphs` loads the first layers of a checkpoint, cuts, verifies and
   traces them, and expands their graphs to all layers.
2. `qeff_proxy.export.write_weights` copies the weights from file to file, each once; the graphs
   point to them.
3. ``onnx.checker`` checks every graph, `qeff_proxy.export.check_graph` runs it at other sizes than
   it was traced at, and ``export.json`` is written last.

A temporary folder is written and moved into place. The same request again is a lookup.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qeff_proxy.artifact.check_target import check_not_another, check_place, existing_export
from qeff_proxy.artifact.export_folder import KEPT, export_folder, read_export, settle_home
from qeff_proxy.artifact.manifest_schema import MANIFEST, Export
from qeff_proxy.common.arguments import one_of, whole_number
from qeff_proxy.common.atomic_folder import locked, recover_folder, staged_folder
from qeff_proxy.common.gc_threshold import collecting_rarely
from qeff_proxy.errors import ArtifactError, ExportError, UsageError
from qeff_proxy.export.cache_key import export_key
from qeff_proxy.load.adapter_inputs import running
from qeff_proxy.load.load_model import LoadedModel, most_positions
from qeff_proxy.parts import WEIGHTS, Kind
from qeff_proxy.plugins.hooks import Hooks

if TYPE_CHECKING:
    from qeff_proxy.export.model_graphs import GraphJob, Graphs

#: Bytes of weights; a smaller model may be loaded whole without a word.
_LARGE = 1 << 30
_CHECKED = "BLAKE3 of the files taken, no NaN found"
#: The exporter writes the operators of this opset, and can only convert them to later ones.
LEAST_OPSET = 18
#: The first that dequantizes 4 bits, and in blocks.
LEAST_OPSET_OF_CODES = 21
_PROCESSOR_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@collecting_rarely()
def export_model(
    loaded: LoadedModel,
    hooks: Hooks,
    kind: Kind = "split",
    *,
    output: Path | None = None,
    opset: int | None = None,
    taps: str | Sequence[str] = (),
    num_layers: int | str | None = None,
    weights: str = "copy",
    force: bool = False,
    wait: bool = True,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Export:
    """Export a model.

    Args:
        loaded: The model; its dtype is the export's.
        hooks: Of its model type.
        kind: ``"split"``, ``"stub"``, or ``"whole"`` for the uncut model as one graph.
        output: The folder to write; by default one below `qeff_proxy.artifact.cache_home`, named
            by model and a hash of all that shapes the export.
        opset: ONNX opset, 18 or later; ``None`` takes the exporter's own choice.
        taps: Outputs of each layer to add: ``"layers"``, ``"attention"``, ``"mlp"``, modules
            inside of these, or several (`qeff_proxy.layers.taps`).
        num_layers: Export the first layers only: so many, or with ``"auto"`` the shortest prefix
            that holds every kind of layer twice (`qeff_proxy.load.shortened_model`).
        weights: ``"copy"``; ``"keep"`` to write the codes and scales of a quantized checkpoint
            instead of float weights (`qeff_proxy.export.keep_codes`); or ``"reference"`` to link
            the checkpoint's own files into the export
            where they hold weights byte for byte: nothing is copied, ONNX Runtime reads them, but
            ``onnx.load`` refuses files that have two names; and whoever changes the checkpoint in
            place changes the export.
        force: Export again even if the same export exists.
        wait: Wait for another run that writes this folder; its export serves if it is the same.
        progress: Called with the name of each stage as it starts.

    Returns:
        The export, read back from its folder.

    Raises:
        UnsupportedModelError: No plugin knows how to cut the model, or its layers cannot be
            found.
        CheckpointError: Its files have changed since it was loaded. Nothing was written.
        CutError: The parts do not equal the model. Nothing was written.
        ExportError: A part cannot be traced. Nothing was written.
        ArtifactError: The folder is in use, or cannot be written. An older export in it is kept.
    """
    from qeff_proxy.layers.taps import normalize_taps

    one_of("kind", kind, get_args(Kind))
    one_of("weights", weights, WEIGHTS)
    if opset is not None:
        from onnx.defs import onnx_opset_version

        whole_number("opset", opset, LEAST_OPSET, onnx_opset_version())
    if weights == "keep":
        opset = LEAST_OPSET_OF_CODES if opset is None else opset
        if opset < LEAST_OPSET_OF_CODES:
            raise UsageError(f"codes are kept from opset {LEAST_OPSET_OF_CODES} on, not {opset}")
        if not any(getattr(weight, "codes", None) for weight in loaded.weights.values()):
            from qeff_proxy.export.keep_codes import no_codes

            raise no_codes()
    if num_layers is not None:
        from qeff_proxy.load.shortened_model import with_depth

        loaded = with_depth(loaded, num_layers)
    wanted = normalize_taps(taps)
    key = export_key(loaded, hooks, kind, opset, wanted, weights)
    target = (output or export_folder(loaded.source, key)).resolve()
    if not force and (found := existing_export(target, key)) is not None:
        # Without the lock, so that several processes can use a finished export.
        return running(found, loaded.adapters)
    check_place(target)
    if output is None:
        settle_home()
    with locked(target, progress if wait else None):
        recover_folder(target, KEPT)
        if not force and (found := existing_export(target, key)) is not None:
            return running(found, loaded.adapters)
        check_place(target)
        if not force and output is not None:
            check_not_another(target, key)
        from qeff_proxy.export.model_graphs import GraphJob

        written = _write(GraphJob(loaded, hooks, kind, opset, wanted, progress), key, target)
    return running(written, loaded.adapters)


def _write(job: GraphJob, key: dict[str, Any], target: Path) -> Export:
    from qeff_proxy.export.model_graphs import graphs_of_sample, graphs_of_whole
    from qeff_proxy.load.first_layers import all_layers, enough_layers
    from qeff_proxy.load.transformers_model import NotSampled

    loaded, progress = job.loaded, job.progress
    write = partial(_write_folder, job, key=key, target=target)
    reasons: list[str] = []
    if loaded.sample is not None and not loaded.is_read:
        verb = "linked to" if key["weights"] == "reference" else "streamed from"
        for choose in (enough_layers, all_layers):
            make = partial(graphs_of_sample, job, choose=choose)
            since = f"; all layers were run, since {reasons[0]}" if reasons else ""
            try:
                return _write_graphs(make, write, f"{verb} the checkpoint{since}", progress)
            except NotSampled as why:
                reasons.append(str(why))
            except ExportError as why:
                if choose is all_layers:
                    raise
                reasons.append(f"its first layers, exported alone, failed: {why}")
            progress("loading the whole model")
        _warn_of_size(loaded, reasons[-1])
    if key["weights"] == "reference":
        raise ArtifactError(
            f"the weights of {loaded.source} cannot be referred to: "
            f"{reasons[-1] if reasons else 'the model is in memory'}",
            "Copy them (--weights copy).",
        )
    since = f", since {reasons[-1]}" if reasons else ""
    make = partial(graphs_of_whole, job)
    return _write_graphs(make, write, f"loaded whole{since}", progress)


def _warn_of_size(loaded: LoadedModel, reason: str) -> None:
    """Say that a large model is loaded whole, and why: it takes memory that others do not need."""
    files = loaded.folder.glob("*.safetensors") if loaded.folder is not None else ()
    size = sum(file.stat().st_size for file in files)
    if size > _LARGE:
        warnings.warn(
            f"{loaded.source} is loaded whole ({size / 1e9:.1f} GB), not layer by layer, since "
            f"{reason.splitlines()[0]}",
            UserWarning,
            stacklevel=4,
        )


def _write_graphs(
    make: Callable[..., Graphs],
    write: Callable[[Graphs], Export],
    how: str,
    progress: Callable[[str], None],
) -> Export:
    """Make the graphs and write them; if cloned layers fail the check, trace all layers.

    Args:
        make: Makes the graphs; takes ``repeat``.
        write: Writes and checks them.
        how: Where their weights come from, for ``export.json``.
        progress: As in `export_model`.
    """
    for repeat in (True, False):
        graphs = make(repeat=repeat)
        graphs.report["weights"] = f"{how}; {_CHECKED}"
        try:
            return write(graphs)
        except ExportError:
            if not graphs.layers or any(check is not None for check in graphs.checks):
                raise
            progress("the repeated layers differ: tracing all of them")
    raise AssertionError("the second turn repeats no layers, so it ends above")


def _write_folder(job: GraphJob, graphs: Graphs, key: dict[str, Any], target: Path) -> Export:
    """Write a temporary folder, check its graphs, and move it into place."""
    from qeff_proxy.export.adapter_inputs import slots_to_inputs
    from qeff_proxy.export.check_graph import sizes_to_check
    from qeff_proxy.export.keep_codes import keep_all_codes
    from qeff_proxy.export.write_files import (
        check_graphs,
        hash_linked,
        write_graphs,
        write_weights,
    )

    loaded, progress, cut = job.loaded, job.progress, graphs.cut
    with staged_folder(target, MANIFEST, KEPT) as folder:
        if loaded.adapters:
            slots_to_inputs(graphs)
        if key["weights"] == "keep":
            keep_all_codes(graphs)
        progress("writing weights")
        linked = key["weights"] == "reference"
        places, hashes = write_weights(folder, graphs, reference=linked)
        if linked:
            progress("checking weights")
            hashes = hash_linked(places, graphs, hashes)
        progress("writing graphs")
        parts = write_graphs(folder, graphs, places)
        progress("checking graphs")
        differences = check_graphs(folder, graphs, parts, places)
        processor = _write_processor(folder / "processor", loaded, graphs)
        loaded.check_unchanged()  # after the last of its files was read
        export = Export(
            folder,
            cut.proxy.kind,
            cut.proxy.flow,
            loaded.dtype,
            {
                "source": loaded.source,
                "model_type": loaded.model_type,
                "architecture": type(graphs.model).__name__,
            },
            parts,
            {name: (folder / name).stat().st_size for name in hashes},
            {
                **cut.to_json(),
                "graphs": differences,
                "check_sizes": {p.name: sizes_to_check(p)[0] for p in cut.proxy.parts},
                "traced_layers": graphs.layers,
                **graphs.report,
                **loaded.notes,
            },
            {
                **cut.proxy.settings,
                "most_positions": most_positions(graphs.model.config),
                **({"taps": key["taps"]} if job.taps else {}),
            },
            key,
            hashes,
            processor,
        )
        export.write_manifest()
        check_place(target)  # again: it took a while
    return read_export(target)


def _write_processor(folder: Path, loaded: LoadedModel, graphs: Graphs) -> tuple[str, ...]:
    """Copy the files that the parts need when the checkpoint is gone; return their names."""
    folder.mkdir()
    if loaded.folder is not None:
        code = ("*.py",) if loaded.trust_remote_code else ()  # a processor's, and what it imports
        for pattern in (*_PROCESSOR_FILES, *code):
            for path in sorted(loaded.folder.glob(pattern)):
                if not path.name.endswith((".index.json", "adapter_config.json")):
                    shutil.copyfile(path, folder / path.name)
        if "stands_for" in loaded.notes:  # another depth than the checkpoint's config says
            graphs.model.config.to_json_file(folder / "config.json", use_diff=False)
    else:
        loaded.model.config.save_pretrained(folder)
        if getattr(loaded.model, "generation_config", None) is not None:
            loaded.model.generation_config.save_pretrained(folder)
    return tuple(sorted(path.name for path in folder.iterdir()))
