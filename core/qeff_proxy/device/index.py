"""``pack.json``: ties each file of a packed folder to its part, step, tensor and valid elements."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from qeff_proxy.common.json_schema import Count, FieldError, Text, plain_json, read_as
from qeff_proxy.dump.format import DTYPES, Phase, step_label
from qeff_proxy.dump.manifest import MAX_ELEMENTS
from qeff_proxy.dump.reader import Dump
from qeff_proxy.dump.rules import parse_json
from qeff_proxy.errors import DumpError

INDEX = "pack.json"
FORMAT = "qeff-proxy-pack"
VERSION = 1
MAX_INDEX_BYTES = 2**28

#: Whose cache a step reads: the reference's (isolated steps), or the device's own (accumulated).
Cache = Literal["reference", "device"]


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of one run, as its file has it.

    Attributes:
        name: The graph's name.
        dtype: Of the file's elements, a key of `qeff_proxy.dump.format.DTYPES`.
        shape: With padding, in the graph's order of axes.
        valid: ``(begin, end)`` of the run's own elements along each axis.
        axes: The file's order of axes, where it is another than the graph's.
    """

    name: Text
    dtype: Text
    shape: tuple[Count, ...]
    valid: tuple[tuple[Count, Count], ...]
    axes: tuple[Count, ...] | None = None

    @property
    def region(self) -> tuple[slice, ...]:
        """The run's own elements."""
        return tuple(slice(begin, end) for begin, end in self.valid)

    @property
    def valid_shape(self) -> tuple[int, ...]:
        """The shape without padding."""
        return tuple(end - begin for begin, end in self.valid)

    def in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape in the file's order of axes."""
        return shape if self.axes is None else tuple(shape[axis] for axis in self.axes)

    @property
    def file_bytes(self) -> int:
        """The size of a raw file of it."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PackedRun:
    """One run of one part: one step.

    Attributes:
        part: Which part runs.
        phase: ``prefill`` or ``decode``.
        index: Of the step within its phase.
        past_length: Cache rows that are valid before the step, or None.
        group: The runs of one binary of one set of shapes have one group; its folder's name.
        inputs: What the folder holds for the run.
        outputs: What the device is to give back.
        carried: Cache inputs that the device keeps from the run before.
    """

    part: Text
    phase: Phase
    index: Count
    past_length: Count | None
    group: Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\0]+\Z")]
    inputs: tuple[PackedTensor, ...]
    outputs: tuple[PackedTensor, ...]
    carried: tuple[Text, ...] = ()

    @property
    def label(self) -> str:
        """``decode-0003``."""
        return step_label(self.phase, self.index)


@dataclass(frozen=True)
class Index:
    """A packed folder.

    Attributes:
        target: The target's name.
        dump: Fingerprint of the dump that was packed (`fingerprint`).
        cache: Whose cache the steps read.
        runs: In the order of the dump's steps, group by group.
    """

    target: Text
    dump: Text
    cache: Cache
    runs: tuple[PackedRun, ...]

    def groups(self) -> dict[str, list[PackedRun]]:
        """The runs of each group, in order."""
        groups: dict[str, list[PackedRun]] = {}
        for run in self.runs:
            groups.setdefault(run.group, []).append(run)
        return groups


def fingerprint(dump: Dump) -> str:
    """A hash of a dump's steps and tensors, whatever made it and when."""
    digest = hashlib.sha256()
    for step in dump.steps:
        digest.update(f"{step.label} {step.past_length}\n".encode())
    for tensor in dump.manifest.tensors:
        digest.update(f"{tensor.file} {tensor.dtype} {tensor.shape or tensor.shapes}\n".encode())
        digest.update(tensor.checksums.tobytes())
    return digest.hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Write ``pack.json``, one run a line."""
    head = {"format": FORMAT, "version": VERSION, "digest": _digest(index), **plain_json(index)}
    del head["runs"]
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    runs = ",\n  ".join(json.dumps(plain_json(run)) for run in index.runs)
    text = "{\n " + ",\n ".join([*lines, f'"runs": [\n  {runs}\n ]']) + "\n}\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def read_index(folder: Path) -> Index:
    """Read and check ``pack.json``.

    Raises:
        DumpError: There is none, or it is damaged.
    """
    path = folder / INDEX
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise DumpError(f"{path} has more than {MAX_INDEX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DumpError(
            f"{path} cannot be read: {error.strerror}",
            "Name the folder that pack wrote; for files of other tools, add --from FORMAT.",
        ) from error
    value = parse_json(data, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DumpError(f"{path} is not the index of a packed folder")
    if value.pop("version", None) != VERSION:
        raise DumpError(f"{path} has another version than {VERSION}")
    del value["format"]
    digest = value.pop("digest", None)
    try:
        index = read_as(Index, value, str(path))
    except FieldError as error:
        raise DumpError(str(error)) from error
    seen = set()
    for run in index.runs:
        key = (run.part, run.phase, run.index)
        if key in seen:
            raise DumpError(f"{path} has {run.label} of the {run.part} part twice")
        seen.add(key)
        for tensor in (*run.inputs, *run.outputs):
            _check_tensor(tensor, f"{tensor.name!r} of {run.label} in {path}")
    if not index.runs:
        raise DumpError(f"{path} lists no runs")
    if digest != _digest(index):  # a file of another step or shape would be compared in silence
        raise DumpError(f"{path} was changed since it was written", "Pack the dump again.")
    return index


def _digest(index: Index) -> str:
    return hashlib.sha256(json.dumps(plain_json(index), sort_keys=True).encode()).hexdigest()


def _check_tensor(tensor: PackedTensor, where: str) -> None:
    if tensor.dtype not in DTYPES:
        raise DumpError(f"{where} has the unknown dtype {tensor.dtype!r}")
    if prod(max(size, 1) for size in tensor.shape) > MAX_ELEMENTS:
        raise DumpError(f"{where} has an impossible shape")
    fits = len(tensor.valid) == len(tensor.shape) and all(
        begin <= end <= size for (begin, end), size in zip(tensor.valid, tensor.shape, strict=True)
    )
    axes = tensor.axes
    if not fits or (axes is not None and sorted(axes) != list(range(len(tensor.shape)))):
        raise DumpError(f"{where} has valid elements or axes that do not fit its shape")
