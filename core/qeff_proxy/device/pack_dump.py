"""Pack a dump for a device: a folder to copy to the lab.

1. `_plan`: for each step of each part the shapes of its files, padded if lengths were given, and
   their group; nothing is read but the manifest.
2. `Target.write_group`: the files, one tensor in memory at a time.
3. `write_index`: ``pack.json``; and ``run.sh``, the commands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.artifact.export_folder import enclosing_export, read_export
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.fixed_shapes import Plan, lowest_of, name_of, pad_into, real_region
from qeff_proxy.backends.lengths import with_fixed_shapes
from qeff_proxy.common.atomic_folder import replaced_folder
from qeff_proxy.common.file_errors import FULL
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.device.conventions import Conventions, pick
from qeff_proxy.device.index import (
    Cache,
    Index,
    PackedRun,
    PackedTensor,
    fingerprint,
    write_index,
)
from qeff_proxy.device.part_source import PartSource, choose_parts
from qeff_proxy.device.target import OUTPUTS, Target, groups_of
from qeff_proxy.dump.format import DTYPES, Direction
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.dump.place import DUMPS
from qeff_proxy.dump.reader import Dump
from qeff_proxy.errors import BackendError, DumpError, UsageError
from qeff_proxy.session.axes import Sizes, is_sum, size_of
from qeff_proxy.session.check_feeds import check_feeds
from qeff_proxy.tensor_names import PAST

SCRIPT = "run.sh"


@dataclass(frozen=True)
class PackOptions:
    """How a dump is packed.

    Attributes:
        parts: Which parts; the only one or ``body`` if empty.
        cache: ``reference``: each step gets the reference's cache. ``device``: the device keeps
            its own from step to step.
        export: The export that ran; needed for `shapes`. By default the one that the dump lies in.
        shapes: Lengths of the compiled binary; None: the shapes of the dump.
        conventions: Dtypes and layouts of the files.
    """

    parts: list[str] = field(default_factory=list)
    cache: Cache = "reference"
    export: Path | Export | None = None
    shapes: CompileOptions | None = None
    conventions: Conventions = field(default_factory=Conventions)


@dataclass(frozen=True)
class _Planned:
    """A run, and what is needed to write it."""

    run: PackedRun
    source: PartSource
    step: StepInfo
    part: ExportedPart | None
    real: Sizes
    sizes: Sizes


def pack_dump(dump: Dump, folder: Path, target: Target, options: PackOptions) -> Index:
    """Write a folder with the inputs of every step, the runner's list, a command and an index.

    Args:
        dump: The reference.
        folder: New or empty.
        target: The tool that is to run it.
        options: Parts, cache, shapes, dtypes and layouts.

    Returns:
        What was written to ``pack.json``.

    Raises:
        DumpError: The dump is damaged or lacks an input, a value does not fit a dtype, or the
            folder is not empty or cannot be written.
        UsageError: The target cannot do what was asked, or an option fits no tensor.
    """
    if options.cache == "device" and not target.carries_cache:
        raise UsageError(
            f"{target.name} runs every step by itself and carries no cache from one to the next",
            "Leave out --cache device: each step then gets the reference's cache.",
        )
    export = _export_of(dump, options)
    sources = [PartSource(dump, part) for part in choose_parts(dump, options.parts)]
    planned = list(_plan(sources, target, options, export))
    names = [t.name for each in planned for t in (*each.run.inputs, *each.run.outputs)]
    options.conventions.check_used(dict.fromkeys(names))
    index = Index(
        target=target.name,
        dump=fingerprint(dump),
        cache=options.cache,
        runs=tuple(each.run for each in planned),
    )
    by_key = {(each.run.part, each.run.phase, each.run.index): each for each in planned}
    with new_folder(folder) as work:
        commands = []
        for group in groups_of(index, work, work / OUTPUTS):
            commands += target.write_group(group, partial(_read, by_key))
            group.outputs.mkdir(parents=True)
        _write_script(work / SCRIPT, commands)
        write_index(work, index)
    return index


def _export_of(dump: Dump, options: PackOptions) -> Export | None:
    folder = options.export
    if folder is not None and options.shapes is None:
        raise UsageError(
            "--export is for fixed shapes", "Add --prefill-seq-len and --ctx-len, or leave it out."
        )
    if isinstance(folder, Export):
        return folder
    if folder is None and options.shapes is not None:
        folder = enclosing_export(dump.folder.resolve())
    if folder is not None:
        return read_export(folder)
    if options.shapes is not None:
        raise UsageError(
            f"the fixed shapes cannot be told: {dump.folder} does not lie in an export",
            "Name the export that ran with --export FOLDER.",
        )
    return None


def _plan(
    sources: list[PartSource], target: Target, options: PackOptions, export: Export | None
) -> Iterator[_Planned]:
    for source in sources:
        part = None
        if options.shapes is not None and export is not None:
            try:
                part = export.part(source.part)
            except KeyError:
                raise UsageError(f"{export.folder} has no part {source.part!r}") from None
        shapes_seen: dict[Any, int] = {}
        for step in source.steps():
            planned = _plan_step(source, step, target, options, part)
            if target.one_shape and part is None:
                shapes = tuple((t.name, t.shape) for t in planned.run.inputs)
                number = shapes_seen.setdefault(shapes, len(shapes_seen))
                group = f"{planned.run.group}.{number}"
                planned = replace(planned, run=replace(planned.run, group=group))
            yield planned


def _plan_step(
    source: PartSource,
    step: StepInfo,
    target: Target,
    options: PackOptions,
    part: ExportedPart | None,
) -> _Planned:
    real: Sizes = {}
    sizes: Sizes = {}
    group = source.part
    names = {side: source.names(step, side) for side in ("in", "out")}
    if part is not None and options.shapes is not None:
        shapes = {name: source.shape_and_dtype(step, "in", name) for name in names["in"]}
        try:
            real = check_feeds(
                part.name,
                part.inputs,
                {
                    n: np.broadcast_to(np.empty((), numpy_dtype(d)), s)
                    for n, (s, d) in shapes.items()
                },
            )
        except BackendError as error:
            raise DumpError(f"{step.label} of {source.dump.folder}: {error}") from error
        lengths = with_fixed_shapes(options.shapes)
        sizes = Plan.of(part, lengths).choose(real)
        if real.get("batch", 1) > lengths.batch_size:
            raise UsageError(
                f"{step.label} has {real['batch']} rows and the binary {lengths.batch_size}",
                f"Pack and compile with --batch-size {real['batch']}.",
            )
        group = f"{source.part}.{name_of(sizes)}"
    specs = {s.name: s for s in (*part.inputs, *part.outputs)} if part is not None else {}

    def tensor(name: str, side: Direction) -> PackedTensor:
        shape, dtype = source.shape_and_dtype(step, side, name)
        valid = tuple((0, size) for size in shape)
        if name in specs:
            spec = specs[name]
            region = real_region(spec, real, sizes, source.part)
            valid = tuple(
                (0, size) if slice_ == slice(None) else (slice_.start, slice_.stop)
                for slice_, size in zip(region, shape, strict=True)
            )
            shape = tuple(
                size_of(axis, sizes) if is_sum(axis) else size
                for axis, size in zip(spec.shape, shape, strict=True)
            )
        asked = pick(options.conventions.dtypes, name)
        meant = name in options.conventions.dtypes  # by its name, not by a glob
        if asked and not meant and DTYPES[asked].inexact and not DTYPES[dtype].inexact:
            asked = None  # of "*=float16" are ids and positions not meant
        plain = target.plain_dtype if not options.conventions.dtypes else None
        return PackedTensor(
            name=name,
            dtype=asked or plain or target.file_dtype(dtype),
            shape=shape,
            valid=valid,
            axes=options.conventions.axes(name, len(shape)),
        )

    carried = [
        name
        for name in names["in"]
        if options.cache == "device" and name.startswith(PAST) and (step.past_length or 0) > 0
    ]
    run = PackedRun(
        part=source.part,
        phase=step.phase,
        index=step.index,
        past_length=step.past_length,
        group=group,
        inputs=tuple(tensor(name, "in") for name in names["in"] if name not in carried),
        outputs=tuple(tensor(name, "out") for name in names["out"]),
        carried=tuple(carried),
    )
    return _Planned(run, source, step, part, real, sizes)


def _read(
    planned: Mapping[Any, _Planned], run: PackedRun, side: Direction
) -> Iterator[tuple[PackedTensor, NDArray[Any]]]:
    """Yield a run's tensors as their files are to have them; not what the device is to quantize."""
    each = planned[run.part, run.phase, run.index]
    for tensor in run.inputs if side == "in" else run.outputs:
        dtype = each.source.shape_and_dtype(each.step, side, tensor.name)[1]
        if side == "out" and DTYPES[dtype].inexact and not DTYPES[tensor.dtype].inexact:
            continue
        array = each.source.array(each.step, side, tensor.name)
        if array.shape != tensor.shape:
            array = _padded(each, tensor, array, side)
        array = cast(array, tensor.dtype, f"{tensor.name} of {run.label}")
        yield tensor, array if tensor.axes is None else array.transpose(tensor.axes)


def _padded(
    each: _Planned, tensor: PackedTensor, array: NDArray[Any], side: Direction
) -> NDArray[Any]:
    buffer = np.zeros(tensor.shape, array.dtype)
    if side == "out":
        buffer[tensor.region] = array
        return buffer
    assert each.part is not None  # noqa: S101 - without it shapes are the dump's
    spec = next(spec for spec in each.part.inputs if spec.name == tensor.name)
    masks = {mask.name for mask in each.part.masks}
    fill = lowest_of(spec.dtype) if spec.name in masks else None
    pad_into(buffer, spec, array, each.real, each.sizes, fill)
    return buffer


def cast(array: NDArray[Any], dtype: str, where: str) -> NDArray[Any]:
    """An array in another dtype, its values rounded and none lost.

    The lowest number of a floating point dtype, which masks use, becomes the lowest of the other.

    Raises:
        DumpError: A value is beyond the dtype, or an integer that it cannot hold.
    """
    new = numpy_dtype(dtype)
    if array.dtype == new:
        return array
    inexact = DTYPES[array.dtype.name].inexact, DTYPES[dtype].inexact
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(new)
        if all(inexact):
            lowest = array == np.array(lowest_of(array.dtype.name), array.dtype)
            result[lowest] = new.type(lowest_of(dtype))
            lost = (np.isinf(result) & ~np.isinf(array)) | (np.isnan(result) & ~np.isnan(array))
        else:
            lost = result.astype(array.dtype) != array
            if inexact[1]:  # the largest integers round up to one that comes back wrapped round
                lost |= result.astype(np.float64) != array.astype(np.float64)
    if lost.any():
        at = tuple(int(i) for i in np.argwhere(lost)[0])
        raise DumpError(
            f"{where} has {array[at]} at {list(at)}, which {dtype} cannot hold",
            f"Choose another dtype: --dtype '{where.split(' ')[0]}=…'.",
        )
    return result


def _write_script(path: Path, commands: list[str]) -> None:
    path.write_text(
        "#!/bin/sh\n# Runs in the folder that this file is in; writes below outputs/.\n"
        "# Give files in variables by absolute paths.\n"
        'set -e\ncd "$(dirname "$0")"\n' + "".join(f"{line}\n" for line in commands),
        encoding="utf-8",
    )
    path.chmod(0o755)


def _is_packed(folder: Path) -> bool:
    """Whether this user made the folder, and it holds files of targets and nothing else."""
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    return folder.lstat().st_uid == os.getuid() and all(path.suffix in _SUFFIXES for path in files)


#: Of the files of all targets.
_SUFFIXES = {".h5", ".json", ".npy", ".npz", ".pb", ".raw", ".sh", ".txt"}
_PACKED = replace(DUMPS, is_ours=_is_packed)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``folder`` when the block ends without an error.

    Raises:
        DumpError: ``folder`` exists and is not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows a link
    try:
        _check_empty(folder)
        with replaced_folder(_PACKED, folder) as work:
            yield work
            _check_empty(folder)
    except OSError as error:
        full = "Free space there, or choose another disk." if error.errno in FULL else None
        raise DumpError(f"{folder} cannot be written: {error.strerror or error}", full) from error


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise DumpError(f"{folder} is not empty", "Choose a new folder.")
