"""LoRA adapters that a model takes as inputs, instead of in its weights.

Each linear module that an adapter changes gets two inputs, named as the tensors in the adapter's
file: ``<module>.lora_A.weight [rank, in]`` and ``<module>.lora_B.weight [out, rank]``. The rank is
that of the largest adapter; smaller ones are filled up with zeros. B is fed times the adapter's
scale (and weight), so that the graph needs neither. Zeros are the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.adapter_files import (
    CONFIG,
    Adapter,
    Adapters,
    header_of,
    parse_adapters,
    read_adapter,
    warn_of_base,
)
from qeff_proxy.load.checkpoint_files import find_checkpoint, folder_named
from qeff_proxy.tensor_names import ADAPTER

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.load.safetensors_header import StoredTensor
    from qeff_proxy.parts import TensorSpec

#: Path of a module → rank, inputs, outputs.
Shapes = dict[str, tuple[int, int, int]]
#: Name of a tensor in an adapter's file, and where it lies.
_Place = tuple[str, "StoredTensor"]
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)(\.lora_[AB]\.weight)")
#: Of the adapters in ``cut`` of ``export.json``.
NOTED = "adapter_inputs"


def shapes_of(adapters: Iterable[Adapter]) -> Shapes:
    """The modules that adapters change; the rank is the largest of all.

    Raises:
        CheckpointError: One changes more than linear modules, or is damaged, or two do not agree.
    """
    found: Shapes = {}
    for adapter in adapters:
        for path, (a, b) in _pairs(adapter).items():
            size = (0, a[1].shape[1], b[1].shape[0])
            if found.setdefault(path, size)[1:] != size[1:]:
                raise _refused(adapter, a[0], f"is of another size than other adapters' {path}")
            found[path] = (max(found[path][0], a[1].shape[0]), *size[1:])
    rank = max((shape[0] for shape in found.values()), default=0)
    return {path: (rank, *shape[1:]) for path, shape in found.items()}


def as_inputs(adapters: Sequence[Adapter], name: str) -> Shapes:
    """`shapes_of` adapters that the model called ``name`` is to take as inputs.

    Raises:
        UsageError: There are none.
    """
    if not adapters:
        raise UsageError(
            "adapters are to be inputs, but none is given",
            "Name the adapters whose modules and rank the inputs are to have (--adapter PATH).",
        )
    warn_of_base(adapters, name)
    return shapes_of(adapters)


def made_with(adapters: Iterable[Adapter]) -> list[str]:
    """Where the adapters lie that an export is made with: what it knows them by."""
    return [str(adapter.folder.resolve()) for adapter in adapters]


def shapes_in(export: Export) -> Shapes:
    """The same, of an export that takes adapters; empty for others."""
    first, second = ADAPTER
    sizes = {s.name: [int(n) for n in s.shape] for s in _inputs(export) if s.name.endswith(ADAPTER)}
    paths = [name.removesuffix(first) for name in sizes if name.endswith(first)]
    return {p: (sizes[p + first][0], sizes[p + first][1], sizes[p + second][0]) for p in paths}


def with_adapter(export: Export, adapters: Adapters) -> Export:
    """An export that runs with an adapter; without any, with the base model.

    Args:
        export: It takes adapters as inputs.
        adapters: One, by its folder or hub id, or by the last name of the path of one that the
            export was made with; its weight may be given, too.

    Raises:
        CheckpointError: It cannot be found, or does not fit.
        UsageError: The export takes none, there are several, or several have that name.
    """
    given = parse_adapters(adapters)
    shapes = shapes_in(export)
    if given and not shapes:
        raise UsageError(
            f"{export.folder} takes no adapters as inputs",
            "Export the checkpoint with --adapter-as-input, or merge the adapter into another "
            "export: name the checkpoint.",
        )
    if len(given) > 1:
        raise UsageError("an export runs with one adapter at a time", "Name one.")
    if not given:
        return replace(export, adapter={}, adapter_name="")
    path, weight = given[0]
    known = [str(one) for one in export.cut.get(NOTED, ())]
    named = [one for one in known if Path(one).name == path]
    if named and not folder_named(path).is_dir():
        if len(named) > 1:
            raise UsageError(f"{path} is the name of {' and of '.join(named)}", "Name its path.")
        path = named[0]
    try:
        folder = find_checkpoint(path, allow_pickle=False, trust_remote_code=False)
    except CheckpointError as error:
        names = ", ".join(sorted({Path(one).name for one in known})) or "none"
        raise CheckpointError(
            f"no adapter is named {path}: {error.problem}",
            f"Give a folder or hub id; the export was made with: {names}.",
        ) from error
    adapter = read_adapter(folder, weight)
    if str(folder.resolve()) not in known:  # of those, whoever exported was warned
        warn_of_base([adapter], export.model["source"])
    return running(export, [adapter])


def running(export: Export, adapters: Sequence[Adapter]) -> Export:
    """An export that runs with the first of the adapters that it was made with, if any."""
    if not adapters:
        return export
    name = str(adapters[0].folder)
    return replace(export, adapter=_arrays(adapters[0], export), adapter_name=name)


def _pairs(adapter: Adapter) -> dict[str, tuple[_Place, _Place]]:
    """Key and place of A and B, by the path of the module; only these can be inputs."""
    found: dict[str, dict[str, _Place]] = {}
    for key, place in header_of(adapter).items():
        match = _TENSOR.fullmatch(key)
        if match is None or len(place.shape) != 2 or not place.dtype.startswith(("F", "BF")):
            raise _refused(adapter, key, "is no A or B of LoRA on a linear module")
        if not adapter.targets(match[1]):
            raise _refused(adapter, key, f"is of a module that {CONFIG} does not name")
        found.setdefault(match[1], {})[match[2]] = key, place
    for path, parts in found.items():
        if len(parts) < len(ADAPTER):
            raise _refused(adapter, next(iter(parts.values()))[0], "lacks its other half")
        for axis, name in enumerate(ADAPTER):
            key, place = parts[name]
            if place.shape[axis] != adapter.rank(path):
                raise _refused(adapter, key, f"is of rank {place.shape[axis]}, unlike {CONFIG}")
    return {path: (parts[ADAPTER[0]], parts[ADAPTER[1]]) for path, parts in found.items()}


def _arrays(adapter: Adapter, export: Export) -> dict[str, Array]:
    """The inputs that an adapter is fed as."""
    from qeff_proxy.load.weight_sources import StoredWeight

    specs = {spec.name: spec for spec in _inputs(export)}
    pairs = _pairs(adapter)
    for path in shapes_in(export):
        named = adapter.settings.get("target_modules") != "all-linear" and adapter.targets(path)
        if named and path not in pairs:
            raise _refused(adapter, path + ADAPTER[0], f"is missing, though {CONFIG} names it")
    arrays: dict[str, Array] = {}
    for path, pair in pairs.items():
        for axis, (key, place) in enumerate(pair):
            spec = specs.get(path + ADAPTER[axis])
            if spec is None and "stands_for" in export.cut:
                continue  # of a layer that the export leaves out
            if spec is None:
                raise _refused(adapter, key, "is for a module that the export has no input for")
            array = np.zeros([int(size) for size in spec.shape])
            room = list(array.shape)
            if place.shape[axis] > room[axis] or place.shape[1 - axis] != room[1 - axis]:
                what = f"has shape {list(place.shape)}, where the export has room for {room}"
                raise _refused(adapter, key, what)
            numbers = StoredWeight(adapter.path, key, place).read().double().numpy()
            if not np.isfinite(numbers).all():
                raise _refused(adapter, key, "has elements that are not finite")
            array[: place.shape[0], : place.shape[1]] = numbers
            array *= adapter.scale(path) * adapter.weight if axis else 1
            arrays[spec.name] = array.astype(numpy_dtype(spec.dtype))
    return arrays


def _inputs(export: Export) -> Iterator[TensorSpec]:
    return (spec for part in export.parts for spec in part.inputs)


def _refused(adapter: Adapter, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{key} in {adapter.path} {why}",
        "Check that the adapter was made for this model, and that the export was made with an "
        "adapter as large; what cannot be an input can be merged (--adapter without "
        "--adapter-as-input).",
    )
