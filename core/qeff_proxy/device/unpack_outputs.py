"""Make a dump of what a device wrote.

The index of the packed folder says which file belongs to which step and tensor
(`qeff_proxy.device.import_recorded` reads files without one). For each tensor

1. `match_files` finds the graph's name that the tool's name means;
2. `decode` checks size and dtype, undoes quantization and layout, and cuts the padding.

A step or tensor that did not come back is missing in the dump, and reported. What could mean two
things is an error that names the option that decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.messages import counted
from qeff_proxy.device.cache_of_step import is_cache, new_rows, with_rows
from qeff_proxy.device.conventions import Conventions, Quantized, Rows, pick
from qeff_proxy.device.index import Index, PackedRun, PackedTensor, fingerprint
from qeff_proxy.device.names import match_name, means, name_said
from qeff_proxy.device.target import OUTPUTS, Found, Target, groups_of, map_raw, raw_size
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import DTYPES, Phase, as_values
from qeff_proxy.dump.reader import Dump, read_dump
from qeff_proxy.dump.selection import DumpOptions
from qeff_proxy.dump.writer import DumpWriter
from qeff_proxy.errors import DumpError, UsageError
from qeff_proxy.tensor_names import PRESENT

_SHOWN = 6  # names in a message


@dataclass
class Unpacked:
    """What came back.

    Attributes:
        folder: The dump.
        cache: ``reference``: each step was fed the reference's cache. ``device``: the device
            carried its own. None: the files do not say.
        steps: Steps in the dump.
        tensors: Tensors in the dump.
        missing: Steps, and tensors of steps, that did not come back.
        ignored: Files that are no output of the graph.
    """

    folder: Path
    cache: str | None = None
    steps: int = 0
    tensors: int = 0
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def unpack_outputs(
    folder: Path,
    target: Target,
    index: Index,
    like: Dump,
    output: Path,
    conventions: Conventions | None = None,
    outputs: Path | None = None,
) -> Unpacked:
    """Make a dump of a packed folder's outputs.

    Args:
        folder: That `pack_dump` wrote.
        target: Which tool ran.
        index: Of the folder.
        like: The dump that was packed.
        output: The new dump.
        conventions: Dtypes, layouts, scales and names that the index does not know.
        outputs: Where the outputs are, if not in ``outputs/`` of the folder.

    Raises:
        DumpError: A file is damaged, has another size than its tensor, or may mean several.
        UsageError: An option fits no tensor.
    """
    conventions = conventions or Conventions()
    check_output(output, like)
    if fingerprint(like) != index.dump:
        raise DumpError(
            f"{folder} was packed from another dump than {like.folder}",
            "Name the dump that was packed, or pack this one.",
        )
    place = outputs if outputs is not None else folder / OUTPUTS
    if not place.is_dir():
        raise DumpError(f"{place} is not a folder", "Say where the outputs are: --outputs DIR.")
    names = dict.fromkeys(t.name for run in index.runs for t in run.outputs)
    conventions.check_used(names)
    result = Unpacked(output, index.cache)
    provenance = {**like.provenance, "backend": target.name, "versions": {}, "options": {}}
    provenance["device"] = {"target": target.name, "cache": index.cache}
    found: dict[tuple[str, Phase, int], list[Found]] = {}
    said: list[tuple[str, str]] = []
    first: dict[tuple[str, Phase, str], tuple[str, str]] = {}
    for group in groups_of(index, folder, place):
        for run, files in target.find_outputs(group) if group.outputs.is_dir() else ():
            found[run.part, run.phase, run.index] = files
            said += ((file.name, group.name) for file in files)
    _check_names(conventions, said)
    kv: Literal["delta", "full"] = "delta" if conventions.rows == "new" else "full"
    with DumpWriter(output, provenance, DumpOptions(tensors="*.out.*", kv=kv)) as writer:
        for run in _in_order(index, like):
            files = found.get((run.part, run.phase, run.index), [])
            matched = match_files(files, run, conventions, result)
            if not matched:
                result.missing.append(f"{run.label} of {run.part}")
                continue
            result.steps += 1
            lost = [t.name for t in run.outputs if t.name not in matched]
            result.missing += [f"{name} in {run.label} of {run.part}" for name in lost]
            for tensor in run.outputs:
                if tensor.name in matched:
                    file = matched[tensor.name]
                    array = decode(file, tensor, run, conventions)
                    key = (run.part, run.phase, tensor.name)
                    _check_like(file, array, first.setdefault(key, (array.dtype.name, file.where)))
                    _write(writer, run, tensor.name, array, conventions)
        check_any(result, place)
    return counted_result(result)


def check_output(output: Path, like: Dump) -> None:
    """Refuse to replace the dump that the new one is compared with.

    Raises:
        UsageError: The new dump would.
    """
    new, old = output.resolve(), like.folder.resolve()
    if new == old or old.is_relative_to(new):
        raise UsageError(
            f"{output} is, or holds, the reference {like.folder}", "Name another --output."
        )


def _in_order(index: Index, like: Dump) -> list[PackedRun]:
    """The runs in the order of the steps, and of the parts in each."""
    steps = {(step.phase, step.index): step.number for step in like.steps}
    parts = {part: number for number, part in enumerate(like.manifest.parts)}
    for run in index.runs:
        if (run.phase, run.index) not in steps or run.part not in parts:
            raise DumpError(f"{like.folder} has no {run.label} of the part {run.part!r}")
    return sorted(index.runs, key=lambda run: (steps[run.phase, run.index], parts[run.part]))


def _check_names(conventions: Conventions, files: list[tuple[str, str]]) -> None:
    """Refuse a ``--name`` that is of no file.

    Raises:
        UsageError: Names it, and the files that there are.
    """
    for glob, name in conventions.names.items():
        if not any(means(glob, said, group) for said, group in files):
            known = ", ".join(dict.fromkeys(said for said, _ in files))
            raise UsageError(f"--name {glob}={name} matches no file", f"There are {known[:300]}.")


def check_any(result: Unpacked, place: Path) -> None:
    """Refuse a folder of which nothing could be used.

    Raises:
        DumpError: Names the files that are there.
    """
    if not result.steps:
        names = ", ".join(result.ignored[:_SHOWN])
        raise DumpError(
            f"{place} holds no output of any step" + (f"; it has {names}" if names else ""),
            "Say where the outputs are with --outputs DIR, or what a file is with "
            "--name 'FILE=TENSOR'." if names else "Say where the outputs are with --outputs DIR.",
        )  # fmt: skip


def counted_result(result: Unpacked) -> Unpacked:
    """The result with the steps and tensors of the dump that was written."""
    dump = read_dump(result.folder)
    return replace(result, steps=len(dump.steps), tensors=len(dump.names()))


def match_files(
    files: list[Found], run: PackedRun, conventions: Conventions, result: Unpacked
) -> dict[str, Found]:
    """The file of each output of a run, by the graph's name."""
    names = [tensor.name for tensor in run.outputs]
    matched: dict[str, Found] = {}
    others: list[Found] = []
    for file in files:
        chosen = name_said(file.name, run.group, conventions.names)
        if chosen is not None and chosen and chosen not in names:
            raise UsageError(
                f"--name {file.name}={chosen}: {run.part} has no output {chosen!r}",
                f"Its outputs are {', '.join(names)}.",
            )
        name = match_name(file.name, names, file.where) if chosen is None else chosen
        if not name:
            others.append(file)
        elif name in matched:
            raise DumpError(
                f"{matched[name].where} and {file.where} may both be {name}",
                f"Leave one out: --name '{file.name}='.",
            )
        else:
            matched[name] = file
    _check_others(others, matched, run, conventions)
    result.ignored += [file.where for file in others]
    return matched


def _check_others(
    others: list[Found], matched: dict[str, Found], run: PackedRun, conventions: Conventions
) -> None:
    """Refuse a file of no known name that has the size of a tensor that is missing."""
    for tensor in run.outputs:
        if tensor.name in matched:
            continue
        likely = [
            file
            for file in others
            if name_said(file.name, run.group, conventions.names) is None and _may_be(file, tensor)
        ]
        if likely:
            shown = ", ".join(file.where for file in likely[:_SHOWN])
            raise DumpError(
                f"{run.label} has no file named {tensor.name}, and {shown} may be it",
                f"Say so with --name '{likely[0].name}={tensor.name}', or leave it out with "
                f"--name '{likely[0].name}='.",
            )


def _may_be(file: Found, tensor: PackedTensor) -> bool:
    if file.raw is not None:
        return raw_size(file.raw) == tensor.file_bytes
    return file.shape is not None and prod(file.shape) == prod(tensor.shape)


def _check_like(file: Found, array: NDArray[Any], first: tuple[str, str]) -> None:
    """Refuse a file of another dtype than the tensor's file of an earlier step."""
    if array.dtype.name != first[0]:
        raise DumpError(
            f"{file.where} is {array.dtype.name}, and {first[1]} is {first[0]}",
            "All steps of a phase have one dtype.",
        )


def _write(
    writer: DumpWriter, run: PackedRun, name: str, array: NDArray[Any], conventions: Conventions
) -> None:
    stub = {}
    if conventions.rows == "new" and name.startswith(PRESENT):
        # The writer asks the inputs for the number of new rows; this one is not selected.
        stub["inputs_embeds"] = np.empty((1, array.shape[CACHE_AXIS]), np.uint8)
    past = run.past_length
    writer.step(run.phase, run.index, run.part, stub, {name: array}, past_length=past)


def decode(
    file: Found, tensor: PackedTensor, run: PackedRun, conventions: Conventions
) -> NDArray[Any]:
    """The run's own elements of a tensor, in the graph's order of axes."""
    if (axes := conventions.axes(tensor.name, len(tensor.shape))) is not None:
        tensor = replace(tensor, axes=axes)
    if conventions.rows in ("front", "back") and is_cache(tensor):
        tensor = with_rows(tensor, tensor.shape[CACHE_AXIS], conventions.rows)
    if conventions.rows == "new" and tensor.name.startswith(PRESENT):
        tensor = new_rows(tensor, run)
    shapes = _shapes(tensor, conventions.rows)
    quantized = pick(conventions.quantized, tensor.name)
    said = pick(conventions.dtypes, tensor.name)
    if file.raw is not None:
        dtype = raw_dtype(file, quantized.dtype if quantized else said, tensor.dtype)
        array = _read_raw(file, tensor, dtype, shapes)
    else:
        array = _load(file, tensor, shapes, said, quantized)
    if quantized is not None:
        if array.dtype.name != quantized.dtype:
            raise DumpError(
                f"{file.where} is {array.dtype.name}, and --quantized says {quantized.dtype}"
            )
        array = ((array.astype(np.float64) + quantized.offset) * quantized.scale).astype(np.float32)
    if tensor.axes is not None:
        array = array.transpose(np.argsort(tensor.axes))
    return array[tensor.region] if array.shape == tensor.shape else array


def raw_dtype(file: Found, said: str | None, expected: str | None) -> str:
    """The dtype of a raw file: what the user says, else what the tool states, else the index's.

    Raises:
        DumpError: It has another size than the elements that the tool states.
    """
    stated = file.dtype or expected
    if stated is None:
        raise DumpError(f"{file.where} says no dtype", f"Say it: --dtype '{file.name}=float32'.")
    if file.certain:
        return said or stated
    size = DTYPES[stated].itemsize
    if said is not None and DTYPES[said].itemsize != size:
        raise DumpError(
            f"{file.name!r} of {file.where} has elements of {counted(size, 'byte')}, which are "
            f"not {said}"
        )
    return said or (expected if expected and DTYPES[expected].itemsize == size else stated)


def _shapes(tensor: PackedTensor, rows: Rows) -> list[tuple[int, ...]]:
    """The shapes, in the graph's order of axes, that a file may have."""
    return [tensor.shape] if rows == "whole" else [tensor.shape, tensor.valid_shape]


def _read_raw(
    file: Found, tensor: PackedTensor, dtype: str, shapes: list[tuple[int, ...]]
) -> NDArray[Any]:
    assert file.raw is not None  # noqa: S101 - the caller looked
    size = raw_size(file.raw)
    fits = (shape for shape in shapes if size == prod(shape) * DTYPES[dtype].itemsize)
    shape = next(fits, shapes[0])
    if file.shape is not None and file.shape != tensor.in_file(shape):
        raise _wrong_shape(file, tensor, file.shape, shape)
    if size != prod(shape) * DTYPES[dtype].itemsize:
        raise _wrong_size(file, tensor, dtype, shape, size)
    return map_raw(file.raw, dtype, tensor.in_file(shape))


def _wrong_size(
    file: Found, tensor: PackedTensor, dtype: str, shape: tuple[int, ...], size: int
) -> DumpError:
    """What to say of a raw file of another size: what it may be, and the option that says so."""
    count, glob = prod(shape), tensor.name
    options = []
    for other in ("float64", "float32", "float16", "bfloat16", "uint16", "uint8", "int8"):
        if other != dtype and count and size == count * DTYPES[other].itemsize:
            inexact = DTYPES[other].inexact
            options.append(
                f"--dtype '{glob}={other}'" if inexact else f"--quantized '{glob}={other},scale:…'"
            )
    if size == prod(tensor.valid_shape) * DTYPES[dtype].itemsize:
        options.append("--rows front (no padding)")
    if tensor.name.startswith(PRESENT):
        options.append("--rows new (the rows of the step alone)")
    expected = count * DTYPES[dtype].itemsize
    problem = (
        f"{file.where} has {counted(size, 'byte')}, not the {expected} of {dtype} {list(shape)}"
    )
    what = "It is cut short" if size < expected else "It is of another tensor or model"
    if not options:
        return DumpError(problem, f"{what}, or of another dtype.")
    return DumpError(problem, f"{what}, or say what it is: {' or '.join(options)}.")


def _load(
    file: Found,
    tensor: PackedTensor,
    shapes: list[tuple[int, ...]],
    said: str | None,
    quantized: Quantized | None,
) -> NDArray[Any]:
    assert file.load is not None  # noqa: S101 - the tool states dtype and shape
    accepted = [tensor.in_file(shape) for shape in (*shapes, tensor.valid_shape)]
    if file.shape is not None and file.shape not in accepted:
        raise _wrong_shape(file, tensor, file.shape, shapes[0])
    array = file.load()
    if array.shape not in accepted:
        raise _wrong_shape(file, tensor, array.shape, shapes[0])
    if said is None and quantized is None and DTYPES[tensor.dtype].inexact:
        known = DTYPES.get(array.dtype.name)
        if known is not None and not known.inexact:
            raise DumpError(
                f"{file.where} is {array.dtype.name}, and {tensor.name} is {tensor.dtype}",
                f"If it is quantized: --quantized '{tensor.name}={array.dtype.name},scale:…'.",
            )
    if said is not None and array.dtype.name != said:
        info = DTYPES[said]
        if info.itemsize == array.dtype.itemsize and array.dtype.kind in "uiV":
            return as_values(np.ascontiguousarray(array).view(info.stored), said)
        raise DumpError(f"{file.where} is {array.dtype.name}, and --dtype says {said}")
    return array


def _wrong_shape(
    file: Found, tensor: PackedTensor, shape: tuple[int, ...], expected: tuple[int, ...]
) -> DumpError:
    hint = "It is of another tensor, step or model."
    if sorted(shape) == sorted(expected) and len(shape) > 2:
        hint = f"If its axes are in another order, say --layout '{tensor.name}=FROM>TO'."
    elif tensor.name.startswith(PRESENT):
        hint = "If it holds only the rows of the step, say --rows new."
    return DumpError(
        f"{file.where} has the shape {list(shape)}, not the {list(tensor.in_file(expected))} of "
        f"{tensor.name}",
        hint,
    )
