"""Read a manifest, trusting nothing: every field is checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.json_schema import Count, FieldError, read_as
from qeff_proxy.common.messages import counted
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import (
    DTYPES,
    FORMAT,
    MAX_RANK,
    VERSION,
    Phase,
    TensorName,
    step_label,
)
from qeff_proxy.dump.rules import refuse

MAX_ELEMENTS = 2**48


@dataclass(frozen=True)
class StepInfo:
    """One step that was dumped.

    Attributes:
        number: Of the step in the run, from 0, over prefill chunks and decode steps alike.
        phase: ``prefill`` or ``decode``.
        index: Of the step within its phase.
        past_length: Cache rows that were valid before the step, or None when there is no cache.
    """

    number: Count
    phase: Phase
    index: Count
    past_length: Count | None

    @property
    def label(self) -> str:
        """``decode-0003``."""
        return step_label(self.phase, self.index)


@dataclass(frozen=True)
class OmittedTensor:
    """A cache input that was not written, its rows being those of earlier outputs."""

    phase: Phase
    name: TensorName
    rows_of: TensorName


@dataclass(frozen=True)
class TensorIndex:
    """What the manifest says about the records of one file.

    Attributes:
        name: Whose records these are.
        phase: Of all records in the file.
        graph_name: What the graph calls the tensor.
        dtype: The true dtype, a key of `qeff_proxy.dump.format.DTYPES`.
        delta: The records are cache rows that the steps added.
        positions: For each record its step, an index into the manifest's steps (int64, rising).
        shape: Of every record when they all have one, else None.
        shapes: Of each record when they differ, else None.
        offsets: For each record its first element, counted from the first of the file (int64).
        checksums: CRC-32 of each record's bytes (uint32).
        stored_elements: In the file.
        stored_records: In the file; fewer than records when some repeat the one before.
    """

    name: TensorName
    phase: Phase
    graph_name: str
    dtype: str
    delta: bool
    positions: NDArray[np.int64]
    shape: tuple[int, ...] | None
    shapes: list[tuple[int, ...]] | None
    offsets: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    stored_elements: int
    stored_records: int

    @property
    def file(self) -> str:
        """The file's path within the dump."""
        return f"{self.phase}/{self.name}.npy"

    @property
    def stored(self) -> str:
        """The numpy dtype string of the bytes on disk."""
        return DTYPES[self.dtype].stored

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of the array that ``np.load`` gives for the file."""
        if self.shape is not None:
            return (self.stored_records, *self.shape)
        return (self.stored_elements,)

    def record_shape(self, record: int) -> tuple[int, ...]:
        """Return the shape of one record."""
        if self.shape is not None:
            return self.shape
        assert self.shapes is not None  # noqa: S101 - one of the two is set
        return self.shapes[record]


@dataclass(frozen=True)
class Manifest:
    """A checked manifest."""

    provenance: dict[str, Any]
    options: dict[str, Any]
    parts: list[str]
    steps: list[StepInfo]
    omitted: list[OmittedTensor]
    tensors: list[TensorIndex]


class _Options(TypedDict):
    steps: str
    tensors: list[str]
    kv: Literal["delta", "full"]


class _Omitted(TypedDict):
    name: str
    phase: Phase
    rows_of: str


class _Tensor(TypedDict):
    name: str
    phase: Phase
    file: str
    part: str
    direction: str
    tensor: str
    layer: Any
    graph_name: str
    dtype: str
    stored: str
    kv: Literal["delta"] | None
    steps: list[Any]
    shape: NotRequired[list[Any]]
    shapes: NotRequired[list[Any]]
    repeats: NotRequired[list[Any]]
    crc32: str


class _Document(TypedDict):
    format: str
    version: int
    byte_order: str
    provenance: dict[str, Any]
    options: _Options
    parts: list[str]
    steps: list[StepInfo]
    omitted: list[_Omitted]
    tensors: list[_Tensor]


def _name(value: str, where: str) -> TensorName:
    try:
        return TensorName.parse(value)
    except ValueError as error:
        refuse("NAME", f"the name of {where}: {error}")


def _check_printable(values: list[str], where: str) -> None:
    if not all(value and value.isprintable() for value in values):
        refuse("FIELDS", f"{where} holds something that is not a printable string")


def check_manifest(value: Any, path: Path) -> Manifest:
    """Return the manifest that a JSON document is.

    Args:
        value: The parsed document.
        path: Where it was read, for errors.

    Raises:
        BrokenRuleError: It breaks a rule of the format.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        refuse("VERSION", f"{path} is not the manifest of a dump")
    if type(value.get("version")) is not int or value["version"] != VERSION:
        refuse("VERSION", f"{path} has version {value.get('version')!r}")
    try:
        document = read_as(_Document, value, "the manifest")
    except FieldError as error:
        refuse("FIELDS", str(error))
    if document["byte_order"] != "little":
        refuse("VERSION", f"{path} has byte order {document['byte_order']!r}")
    options, parts, steps = document["options"], document["parts"], document["steps"]
    _check_printable([options["steps"], *options["tensors"]], "options")
    _check_printable(parts, "parts")
    if len(set(parts)) != len(parts):
        refuse("FIELDS", "parts names a part twice")
    _check_steps(steps)
    tensors = [
        _check_tensor(tensor, f"tensor {number}", steps)
        for number, tensor in enumerate(document["tensors"])
    ]
    seen: set[tuple[str, str]] = set()
    for index in tensors:
        key = (index.phase, str(index.name).casefold())
        if key in seen:
            refuse("UNIQUE", f"{index.file} is named twice")
        seen.add(key)
        if index.name.part not in parts:
            refuse("FIELDS", f"the part of {index.file} is not one of parts")
    omitted = [
        OmittedTensor(
            entry["phase"],
            _name(entry["name"], f"omitted {number}"),
            _name(entry["rows_of"], f"omitted {number}"),
        )
        for number, entry in enumerate(document["omitted"])
    ]
    return Manifest(value["provenance"], value["options"], parts, steps, omitted, tensors)


def _check_steps(steps: list[StepInfo]) -> None:
    seen: set[tuple[str, int]] = set()
    last = -1
    for step in steps:
        if (step.phase, step.index) in seen:
            refuse("STEPS", f"{step.label} comes twice")
        if step.number <= last:
            refuse("STEPS", f"{step.label} has number {step.number} after {last}")
        seen.add((step.phase, step.index))
        last = step.number


def _check_tensor(value: _Tensor, where: str, steps: list[StepInfo]) -> TensorIndex:
    if ("shape" in value) == ("shapes" in value):
        refuse("FIELDS", f"{where} has not exactly one of 'shape' and 'shapes'")
    name = _name(value["name"], where)
    where = str(name)
    phase = value["phase"]
    said = (value["part"], value["direction"], value["tensor"], value["layer"])
    if said != (name.part, name.direction, name.tensor, name.layer) or (
        name.layer is not None and type(value["layer"]) is not int
    ):
        refuse("NAME", f"the part, direction, tensor and layer of {where} are not those it names")
    if value["file"] != f"{phase}/{name}.npy":
        refuse("FILE", f"the file of {where} is {value['file']!r}")
    _check_printable([value["graph_name"]], f"'graph_name' of {where}")
    info = DTYPES.get(value["dtype"])
    if info is None or value["stored"] != info.stored:
        refuse("DTYPE", f"{where} is {value['dtype']!r} stored as {value['stored']!r}")
    positions = _expand(value["steps"], len(steps), f"the steps of {where}")
    if len(positions) == 0 or any(steps[p].phase != phase for p in positions):
        refuse("RECORDS", f"{where} has no records, or some of another phase")
    varying = "shapes" in value
    shapes = [_shape(s, where) for s in (value["shapes"] if varying else [value["shape"]])]
    if varying and len(shapes) != len(positions):
        refuse(
            "RECORDS",
            f"{where} has {counted(len(positions), 'record')} and {counted(len(shapes), 'shape')}",
        )
    if value["kv"] == "delta":
        _check_delta(where, shapes, [steps[p] for p in positions])
    offsets, elements, records = _locate_records(value, where, shapes, len(positions))
    return TensorIndex(
        name=name,
        phase=phase,
        graph_name=value["graph_name"],
        dtype=value["dtype"],
        delta=value["kv"] == "delta",
        positions=positions,
        shape=None if varying else shapes[0],
        shapes=shapes if varying else None,
        offsets=offsets,
        checksums=_checksums(value["crc32"], len(positions), where),
        stored_elements=elements,
        stored_records=records,
    )


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        refuse("SHAPE", f"a shape of {where} is not a list of at most {MAX_RANK} dimensions")
    if not all(type(size) is int and 0 <= size < 2**53 for size in value):
        refuse("SHAPE", f"a dimension of {where} is not a count")
    shape = tuple(value)
    if prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        refuse("SHAPE", f"{where} is said to have {' x '.join(map(str, shape))} elements")
    return shape


def _check_delta(where: str, shapes: list[tuple[int, ...]], steps: list[StepInfo]) -> None:
    if any(len(shape) != CACHE_AXIS + 2 for shape in shapes):
        refuse("KV", f"{where} is said to hold cache rows but has another number of dimensions")
    if any(step.past_length is None for step in steps):
        refuse("KV", f"{where} has rows of a step whose past_length is not known")


def _expand(runs: list[Any], limit: int, where: str) -> NDArray[np.int64]:
    """Return the numbers in half-open, rising runs below ``limit``."""
    end = 0
    for run in runs:
        if (
            not isinstance(run, list)
            or len(run) != 2
            or not all(type(n) is int for n in run)
            or not end <= run[0] < run[1] <= limit
        ):
            refuse("RECORDS", f"{where} are not rising runs below {limit}")
        end = run[1]
    if not runs:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(first, last, dtype=np.int64) for first, last in runs])


def _checksums(text: str, records: int, where: str) -> NDArray[np.uint32]:
    try:
        data = bytes.fromhex(text) if text.isalnum() else b""
    except ValueError:
        data = b""
    if len(text) != 8 * records or len(data) != 4 * records:
        refuse(
            "RECORDS",
            f"{where} has {counted(records, 'record')} and {len(text)} digits of checksums",
        )
    return np.frombuffer(data, ">u4").astype(np.uint32)


def _locate_records(
    value: _Tensor, where: str, shapes: list[tuple[int, ...]], records: int
) -> tuple[NDArray[np.int64], int, int]:
    """Return the offset of each record, and the elements and records that the file holds."""
    repeated = np.zeros(records, bool)
    repeated[_expand(value.get("repeats", []), records, f"the repeats of {where}")] = True
    if repeated[0]:
        refuse("RECORDS", f"the first record of {where} repeats another")
    sizes = [prod(shape) for shape in shapes]
    if len(sizes) == 1:
        sizes *= records
    if sum(sizes) > MAX_ELEMENTS:
        refuse("SHAPE", f"the records of {where} are said to have {sum(sizes)} elements")
    for record in np.flatnonzero(repeated):
        if len(shapes) > 1 and shapes[record] != shapes[record - 1]:
            refuse("RECORDS", f"record {record} of {where} repeats one of another shape")
    counts = np.where(repeated, 0, np.array(sizes, np.int64))
    ends = np.cumsum(counts)
    starts = ends - counts
    latest = np.maximum.accumulate(np.where(repeated, 0, np.arange(records)))
    return starts[latest], int(ends[-1]), int(records - repeated.sum())
