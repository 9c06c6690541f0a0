"""Write the weights and graphs of an export, hash and check them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.errors import ExportError
from qeff_proxy.export.check_graph import check_graph
from qeff_proxy.export.write_weights import check_and_hash, point_into, save_weights
from qeff_proxy.load.safetensors_header import StoredTensor
from qeff_proxy.load.weight_sources import StoredWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qeff_proxy.export.model_graphs import Graphs
    from qeff_proxy.export.trace.trace_part import TracedPart

    Places = Mapping[str, StoredWeight]


def write_weights(
    folder: Path, graphs: Graphs, *, reference: bool = False
) -> tuple[Places, dict[str, str]]:
    """Write one weights file per group.

    Args:
        folder: Where to write them.
        graphs: Their weights are written.
        reference: Link the checkpoint's own files instead, where they serve; `hash_linked` hashes
            those.

    Returns:
        Name of each weight → where it lies; and file name → hash.

    Raises:
        CheckpointError: A weight that was written has NaN elements.
    """
    groups: dict[str, list[TracedPart]] = {}
    for part, traced in zip(graphs.cut.proxy.parts, graphs.traced, strict=True):
        if traced.weights:
            groups.setdefault(f"{part.weights}.safetensors", []).append(traced)
    places: dict[str, StoredWeight] = {}
    hashes: dict[str, str] = {}
    for name, group in groups.items():
        saved = save_weights(folder / name, group, graphs.sources, reference=reference)
        places.update(saved.places)
        if saved.digest is not None:
            hashes[name] = saved.digest
    return places, hashes


def hash_linked(places: Places, graphs: Graphs, hashes: Mapping[str, str]) -> dict[str, str]:
    """The hash of each weights file, linked ones too; their weights are checked for NaN."""
    files: dict[Path, dict[str, StoredTensor]] = {}
    for name, stored in places.items():
        files.setdefault(stored.path, {})[name] = stored.place
    return {
        path.name: hashes.get(path.name) or check_and_hash(path, tensors, graphs.sources)
        for path, tensors in sorted(files.items())
    }


def write_graphs(folder: Path, graphs: Graphs, places: Places) -> tuple[ExportedPart, ...]:
    """Write one ONNX file per part."""
    exported = []
    for part, traced in zip(graphs.cut.proxy.parts, graphs.traced, strict=True):
        path = folder / f"{part.name}.onnx"
        _write_graph(path, traced, places)
        used = {spec.name for spec in traced.inputs}
        exported.append(
            ExportedPart(
                part.name,
                path.name,
                _weights_file(traced, places),
                sha256_of(path),
                traced.inputs,
                traced.outputs,
                tuple(mask for mask in part.masks if mask.name in used),
            )
        )
    return tuple(exported)


def check_graphs(
    folder: Path, graphs: Graphs, parts: Sequence[ExportedPart], places: Places
) -> dict[str, float | None]:
    """Run each part in ONNX Runtime and PyTorch; largest difference by part.

    A part of which only the first layers are loaded is run with these, on the weights that were
    written.
    """
    differences = {}
    checks = zip(graphs.cut.proxy.parts, graphs.checks, parts, strict=True)
    for part, check, exported in checks:
        path, inputs = folder / exported.file, exported.inputs
        if check is not None:
            path, inputs = folder / f"check-{exported.file}", check.inputs
            _write_graph(path, check, places)
        differences[part.name] = check_graph(part, inputs, path)
        if check is not None:
            path.unlink()
    return differences


def _weights_file(traced: TracedPart, places: Places) -> str | None:
    """The file that most of a part's weights lie in; ``None`` where it has none."""
    sizes: dict[str, int] = {}
    for name in traced.weights:
        file = places[name].path.name
        sizes[file] = sizes.get(file, 0) + places[name].place.length
    return max(sizes, key=lambda file: sizes[file], default=None)


def _write_graph(path: Path, traced: TracedPart, places: Places) -> None:
    point_into(traced, places)
    ir.save(traced.model, path)
    try:
        onnx.checker.check_model(_without_weights(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the {traced.name} part is no valid ONNX: {str(error).splitlines()[0]}"
        ) from error


def _without_weights(path: Path) -> onnx.ModelProto:
    """The graph with inputs instead of weights: the checker refuses files that have two names."""
    model = onnx.load(path, load_external_data=False)
    external = [
        tensor
        for tensor in model.graph.initializer
        if onnx.external_data_helper.uses_external_data(tensor)
    ]
    for tensor in external:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.initializer.remove(tensor)
        model.graph.input.append(value)
    return model
