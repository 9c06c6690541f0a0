"""Export: from a loaded model to a folder of ONNX parts.

1. `qeff_proxy.cut.cut_model` cuts and verifies.
2. `qeff_proxy.trace.trace_part` turns each part into a graph without weights; of layers that are
   alike only one is traced (`qeff_proxy.repeat`).
3. `qeff_proxy.weights` writes each weight once and lets the graphs point to it.
4. ``onnx.checker`` looks at every file, `qeff_proxy.check_graph` runs it at other sizes than it was
   traced at, and ``export.json`` is written last.

The folder is written aside and moved into place. The same request again is a lookup.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from importlib_metadata import version

from qeff_proxy.artifact import (
    MANIFEST,
    Export,
    ExportedPart,
    export_folder,
    read_export,
    sha256_of,
)
from qeff_proxy.errors import ArtifactError, CutError, ExportError
from qeff_proxy.staging import locked, recover_folder, staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qeff_proxy.cut import Cut
    from qeff_proxy.load import LoadedModel
    from qeff_proxy.parts import Kind
    from qeff_proxy.plugin_hooks import Hooks
    from qeff_proxy.safetensors_file import StoredTensor
    from qeff_proxy.trace import TracedPart

__all__ = ["export_key", "export_model"]

#: Subfolders that a new export of the same folder takes over from the old one.
_KEPT = ("io",)
_PROCESSOR_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_VERSIONS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


def export_model(
    loaded: LoadedModel,
    hooks: Hooks,
    kind: Kind = "split",
    *,
    output: Path | None = None,
    opset: int | None = None,
    taps: str | Sequence[str] = (),
    force: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Export:
    """Export a model.

    Args:
        loaded: The model; its dtype is the export's.
        hooks: Of its model type.
        kind: ``"split"``, ``"stub"``, or ``"whole"`` for the uncut model as one graph.
        output: The folder to write; by default one below `qeff_proxy.artifact.cache_home`, named
            by model and a hash of all that shapes the export.
        opset: ONNX opset; ``None`` takes the exporter's own choice.
        taps: What each layer gives as extra outputs: ``"layers"``, ``"attention"``, ``"mlp"``, or
            several (`qeff_proxy.taps`).
        force: Export again even where the same export is there already.
        progress: Told the name of each stage as it begins.

    Returns:
        The export, read back from its folder.

    Raises:
        UnsupportedModelError: No plugin knows how to cut the model, or its layers cannot be
            found.
        CutError: The parts do not equal the model. Nothing was written.
        ExportError: A part cannot be traced. Nothing was written.
        ArtifactError: The folder is in use, or cannot be written. An older export in it is kept.
    """
    from qeff_proxy.taps import normalize_taps

    wanted = normalize_taps(taps)
    key = export_key(loaded, hooks, kind, opset, wanted)
    target = (output or export_folder(loaded.source, key)).resolve()
    _check_target(target)
    if not force and (found := _existing(target, key)) is not None:
        return found  # without the lock, so that what is whole can be used side by side
    with locked(target):
        recover_folder(target, _KEPT)
        if not force and (found := _existing(target, key)) is not None:
            return found
        if not force and output is not None:
            _check_not_another(target, key)
        return _write(loaded, hooks, kind, opset, wanted, key, target, progress)


def _write(
    loaded: LoadedModel,
    hooks: Hooks,
    kind: Kind,
    opset: int | None,
    taps: tuple[str, ...],
    key: dict[str, Any],
    target: Path,
    progress: Callable[[str], None],
) -> Export:
    from qeff_proxy.cut import cut_model
    from qeff_proxy.taps import tap_proxy

    progress("cutting and verifying")
    cut = cut_model(loaded, hooks, kind)
    cut = replace(cut, proxy=tap_proxy(cut.proxy, taps))
    for repeat in (True, False):
        traced, layers = _trace_parts(loaded, cut, opset, progress, repeat=repeat)
        try:
            return _write_folder(loaded, cut, traced, layers, key, target, progress)
        except ExportError:
            if not layers:
                raise
            progress("the repeated layers differ: tracing all of them")
    raise AssertionError("the second turn repeats no layers, so it ends above")


def _trace_parts(
    loaded: LoadedModel,
    cut: Cut,
    opset: int | None,
    progress: Callable[[str], None],
    *,
    repeat: bool,
) -> tuple[list[TracedPart], dict[str, int]]:
    """The parts' graphs; and of those whose layers were repeated, how many were traced."""
    from qeff_proxy.repeat import trace_repeated
    from qeff_proxy.trace import trace_part

    model = loaded.model
    tensors = dict([*model.named_buffers(), *model.named_parameters()])
    names = {id(tensor): name for name, tensor in tensors.items()}
    traced: list[TracedPart] = []
    layers: dict[str, int] = {}
    for part in cut.proxy.parts:
        progress(f"tracing {part.name}")
        found = trace_repeated(part, names, tensors, opset) if repeat else None
        if found is None:
            traced.append(trace_part(part, names, opset))
        else:
            traced.append(found[0])
            layers[part.name] = found[1]
    if cut.proxy.kind == "split":
        _check_separate(loaded, cut, traced)
    return traced, layers


def _write_folder(
    loaded: LoadedModel,
    cut: Cut,
    traced: list[TracedPart],
    layers: dict[str, int],
    key: dict[str, Any],
    target: Path,
    progress: Callable[[str], None],
) -> Export:
    """Write everything aside, check the graphs, and move the folder into place."""
    from qeff_proxy.check_graph import check_graph

    taps = key["taps"]
    with staged_folder(target, MANIFEST, _KEPT) as folder:
        progress("writing weights")
        places = _write_weights(folder, cut, traced)
        progress("writing graphs")
        parts = _write_graphs(folder, cut, traced, places)
        progress("checking graphs")
        differences = {
            part.name: check_graph(part, exported.inputs, folder / exported.file)
            for part, exported in zip(cut.proxy.parts, parts, strict=True)
        }
        _write_processor(folder / "processor", loaded)
        export = Export(
            folder,
            cut.proxy.kind,
            cut.proxy.flow,
            loaded.dtype,
            {
                "source": loaded.source,
                "model_type": loaded.model_type,
                "architecture": type(loaded.model).__name__,
            },
            parts,
            {name: (folder / name).stat().st_size for name in places},
            {**cut.to_json(), "graphs": differences, "traced_layers": layers},
            {**cut.proxy.settings, **({"taps": taps} if taps else {})},
            key,
            {name: sha256_of(folder / name) for name in places},
        )
        export.write_manifest()
    return read_export(target)


def export_key(
    loaded: LoadedModel,
    hooks: Hooks,
    kind: Kind,
    opset: int | None,
    taps: Sequence[str] = (),
) -> dict[str, Any]:
    """All that shapes an export: the same key, the same folder."""
    return {
        "identity": loaded.identity,
        "kind": kind,
        "dtype": loaded.dtype,
        "opset": opset,
        "taps": list(taps),
        "plugin": {
            "name": hooks.plugin,
            "distribution": hooks.distribution,
            "version": hooks.version,
            "code": _plugin_digest(hooks),
        },
        "qeff-proxy": version("qeff-proxy"),
        "code": _code_digest(Path(__file__).parent),
        **{name: version(name) for name in _VERSIONS},
    }


def _code_digest(folder: Path) -> str:
    """A hash of a package's own code, so that an edited installation exports anew."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _plugin_digest(hooks: Hooks) -> str | None:
    """The same for the package of an installed plugin; ``None`` for one registered from Python."""
    if hooks.distribution is None:
        return None
    spec = importlib.util.find_spec(hooks.plugin.partition(":")[0].partition(".")[0])
    folders = spec.submodule_search_locations if spec is not None else None
    return _code_digest(Path(next(iter(folders)))) if folders else None


def _existing(target: Path, key: dict[str, Any]) -> Export | None:
    """The export in ``target``, if it is whole and what was asked for."""
    if not (target / MANIFEST).is_file():
        return None
    try:
        found = read_export(target)
    except ArtifactError:
        return None  # damaged: export again
    return found if found.made_by == key else None


def _check_not_another(target: Path, key: dict[str, Any]) -> None:
    """Refuse to replace an export of something else."""
    try:
        found = read_export(target)
    except ArtifactError:
        return  # none, or a damaged one
    what = ("identity", "kind", "dtype", "opset", "taps")
    if any(found.made_by.get(name) != key[name] for name in what):
        raise ArtifactError(
            f"{target} holds another export ({found.model['source']}, {found.kind}, {found.dtype})",
            "Name another folder, or pass --force (force=True) to replace it.",
        )


def _check_target(target: Path) -> None:
    """Refuse to replace a folder that is something else than an export."""
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file", "Name a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} is not empty and holds no export", "Name a new or empty folder."
        )
    known = {MANIFEST, "processor", "compiled", *_KEPT}
    foreign = [
        path.name
        for path in (sorted(target.iterdir()) if target.is_dir() else ())
        if path.name not in known and path.suffix not in {".onnx", ".safetensors"}
    ]
    if foreign:
        raise ArtifactError(
            f"{target} also holds {foreign[0]}, which is no part of an export",
            "Move it elsewhere, or name another folder.",
        )


def _check_separate(loaded: LoadedModel, cut: Cut, traced: list[TracedPart]) -> None:
    """Make sure that no weight of a site is left in the body."""
    from qeff_proxy.cut import site_weights

    for name, site in cut.sites.items():
        own = site_weights(loaded, site)
        for traced_part, part in zip(traced, cut.proxy.parts, strict=True):
            left = own & set(traced_part.weights)
            if part.weights != "vocabulary" and left:
                raise CutError(
                    f"the {part.name} part still holds {min(left)}, which belongs to the {name}",
                    "The plugin's build_proxy must keep it out of that part.",
                )


def _write_weights(
    folder: Path, cut: Cut, traced: list[TracedPart]
) -> dict[str, dict[str, StoredTensor]]:
    """Write one weights file per group; give where everything lies, by file."""
    from qeff_proxy.weights import save_weights

    groups: dict[str, list[TracedPart]] = {}
    for part, traced_part in zip(cut.proxy.parts, traced, strict=True):
        if traced_part.weights:
            groups.setdefault(f"{part.weights}.safetensors", []).append(traced_part)
    return {name: save_weights(folder / name, group) for name, group in groups.items()}


def _write_graphs(
    folder: Path,
    cut: Cut,
    traced: list[TracedPart],
    places: dict[str, dict[str, StoredTensor]],
) -> tuple[ExportedPart, ...]:
    import onnx
    import onnx_ir as ir

    from qeff_proxy.weights import point_into

    exported = []
    for part, traced_part in zip(cut.proxy.parts, traced, strict=True):
        weights = f"{part.weights}.safetensors" if traced_part.weights else None
        if weights is not None:
            point_into(traced_part, folder / weights, places[weights])
        path = folder / f"{part.name}.onnx"
        ir.save(traced_part.model, path)
        try:
            onnx.checker.check_model(path, full_check=False)
        except onnx.checker.ValidationError as error:
            raise ExportError(
                f"the {part.name} part is no valid ONNX: {str(error).splitlines()[0]}"
            ) from error
        used = {spec.name for spec in traced_part.inputs}
        exported.append(
            ExportedPart(
                part.name,
                path.name,
                weights,
                sha256_of(path),
                traced_part.inputs,
                traced_part.outputs,
                tuple(mask for mask in part.masks if mask.name in used),
            )
        )
    return tuple(exported)


def _write_processor(folder: Path, loaded: LoadedModel) -> None:
    """Put beside the parts what is needed to use them without the checkpoint."""
    folder.mkdir()
    if loaded.folder is not None:
        for pattern in _PROCESSOR_FILES:
            for path in sorted(loaded.folder.glob(pattern)):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
        return
    loaded.model.config.save_pretrained(folder)
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(folder)
