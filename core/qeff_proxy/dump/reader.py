"""Read dumps, lazily, and refuse what is not one.

Opening a dump reads the manifest and the header of every file, and compares the two;
elements are read when they are asked for, and their checksums with them.
"""

from __future__ import annotations

import os
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.atomic_folder import clear_leftovers
from qeff_proxy.common.messages import counted
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import DTYPES, HEADER_BYTES, MANIFEST, PHASES, TensorName, as_values
from qeff_proxy.dump.manifest import check_manifest
from qeff_proxy.dump.npy import parse_header
from qeff_proxy.dump.place import DUMPS
from qeff_proxy.dump.rules import parse_json, refuse
from qeff_proxy.errors import DumpError

if TYPE_CHECKING:
    from qeff_proxy.dump.format import Phase
    from qeff_proxy.dump.manifest import Manifest, OmittedTensor, StepInfo, TensorIndex

MAX_MANIFEST_BYTES = 2**28


class StoredTensor:
    """The records of one tensor in one phase, on disk.

    Attributes:
        index: What the manifest says about them.
    """

    def __init__(self, folder: Path, index: TensorIndex) -> None:
        self.index = index
        self._path = folder / index.phase / f"{index.name}.npy"
        self._itemsize = DTYPES[index.dtype].itemsize

    def __len__(self) -> int:
        """The number of records."""
        return len(self.index.positions)

    def open(self) -> int:
        """Return a descriptor of the file, for `read_bytes`; the caller closes it.

        Raises:
            BrokenRuleError: The file is missing, a link or not regular.
        """
        return _open_regular(self._path)

    def read_bytes(self, descriptor: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with stored bytes.

        Args:
            descriptor: From `open`.
            offset: Of the first element, counted from the first of the file.
            buffer: Bytes, a whole number of elements.

        Raises:
            BrokenRuleError: The file ends before (rule ``SIZE``).
            DumpError: The disk cannot read it.
        """
        at = HEADER_BYTES + offset * self._itemsize
        try:
            while buffer:
                count = os.preadv(descriptor, [buffer], at)
                if count == 0:
                    refuse("SIZE", f"{self._path} ends before its last record")
                buffer, at = buffer[count:], at + count
        except OSError as error:
            raise DumpError(f"{self._path} cannot be read: {error.strerror}") from error

    def read(self, record: int, *, verify: bool = True) -> NDArray[Any]:
        """Return the elements of one record, in their true dtype and shape.

        Args:
            record: Its number in the file, from 0.
            verify: Whether to check its checksum.

        Raises:
            BrokenRuleError: The file is cut short, or the bytes are damaged (rule ``CHECKSUM``).
        """
        shape = self.index.record_shape(record)
        stored = np.empty(shape, np.dtype(self.index.stored))
        data = stored.reshape(-1).view(np.uint8).data
        descriptor = self.open()
        try:
            self.read_bytes(descriptor, int(self.index.offsets[record]), data)
        finally:
            os.close(descriptor)
        if verify:
            self.check(record, zlib.crc32(data))
        return as_values(stored, self.index.dtype)

    def check(self, record: int, checksum: int) -> None:
        """Refuse a record whose bytes have another checksum than the manifest says.

        Raises:
            BrokenRuleError: Rule ``CHECKSUM``.
        """
        if checksum != int(self.index.checksums[record]):
            refuse("CHECKSUM", f"record {record} of {self._path} is damaged")


@dataclass(frozen=True)
class Dump:
    """A dump on disk.

    Attributes:
        folder: Where it stands.
        manifest: Checked; steps, parts, provenance and options are there.
        tensors: Of every (phase, name), in the order in which they were first written.
    """

    folder: Path
    manifest: Manifest
    tensors: dict[tuple[Phase, TensorName], StoredTensor]
    _steps: dict[tuple[str, int], int] = field(repr=False)

    @property
    def steps(self) -> list[StepInfo]:
        """The steps that were dumped, in the order in which they ran."""
        return self.manifest.steps

    @property
    def provenance(self) -> dict[str, Any]:
        """What made the dump."""
        return self.manifest.provenance

    @property
    def omitted(self) -> list[OmittedTensor]:
        """Cache inputs that `array` puts together from earlier outputs."""
        return self.manifest.omitted

    def names(self) -> list[str]:
        """Return the names of all tensors that were written, each once."""
        return list(dict.fromkeys(str(name) for _, name in self.tensors))

    def array(self, phase: Phase, index: int, name: str | TensorName) -> NDArray[Any]:
        """Return a tensor of one step as the graph saw it, in its true dtype.

        A cache tensor of the delta form is put together from the rows of this and earlier steps.

        Args:
            phase: ``prefill`` or ``decode``.
            index: Of the step within its phase.
            name: Such as ``body.out.present_key.layer-07``.

        Raises:
            DumpError: The step or tensor was not dumped, rows of it were not, or it is damaged.
        """
        key = TensorName.parse(name) if isinstance(name, str) else name
        position = self._position(phase, index)
        for omitted in self.omitted:
            if omitted.phase == phase and omitted.name == key:
                return self._cache_rows(omitted.rows_of, position, before=True)
        tensor = self.tensors.get((phase, key))
        if tensor is not None and tensor.index.delta:
            return self._cache_rows(key, position, before=False)
        return self._record(phase, index, key, position)

    def written(self, phase: Phase, index: int, name: str | TensorName) -> NDArray[Any]:
        """Return what was written for one step: of a delta cache tensor the new rows only.

        Args:
            phase: ``prefill`` or ``decode``.
            index: Of the step within its phase.
            name: Such as ``body.out.present_key.layer-07``.

        Raises:
            DumpError: The step or tensor was not dumped, or it is damaged.
        """
        key = TensorName.parse(name) if isinstance(name, str) else name
        return self._record(phase, index, key, self._position(phase, index))

    def _position(self, phase: str, index: int) -> int:
        if (phase, index) not in self._steps:
            raise DumpError(f"{self.folder} has no step {phase} {index}")
        return self._steps[phase, index]

    def _record(self, phase: Phase, index: int, key: TensorName, position: int) -> NDArray[Any]:
        tensor = self.tensors.get((phase, key))
        record = -1 if tensor is None else int(np.searchsorted(tensor.index.positions, position))
        if tensor is None or record == len(tensor) or tensor.index.positions[record] != position:
            raise DumpError(f"{self.folder} has no tensor {key} in {phase} {index}")
        return tensor.read(record)

    def _cache_rows(self, key: TensorName, position: int, *, before: bool) -> NDArray[Any]:
        """Join the rows that all steps up to ``position`` (without it: ``before``) added."""
        until = self.steps[position]
        rows_expected = until.past_length if before else None
        pieces: list[NDArray[Any]] = []
        rows = 0
        for step in self.steps[: position + (not before)]:
            tensor = self.tensors.get((step.phase, key))
            at = self._steps[step.phase, step.index]
            if tensor is None or at not in tensor.index.positions:
                continue
            if step.past_length is None or not tensor.index.delta:
                raise DumpError(f"{key} is not in the delta form in every step of {self.folder}")
            if step.past_length != rows:
                break
            pieces.append(self._record(step.phase, step.index, key, at))
            rows += pieces[-1].shape[CACHE_AXIS]
        if rows_expected is None:
            last = self._record(until.phase, until.index, key, position) if not before else None
            rows_expected = (until.past_length or 0) + (
                0 if last is None else last.shape[CACHE_AXIS]
            )
        if rows != rows_expected:
            raise DumpError(
                f"{key} of {until.label} has {counted(rows_expected, 'row')}, of which "
                f"{self.folder} holds {rows}",
                "Dump all steps, or use kv='full'.",
            )
        if not pieces:
            template = self.written(until.phase, until.index, key)
            return template[:, :, :0]
        return np.concatenate(pieces, axis=CACHE_AXIS)


def _open_regular(path: Path) -> int:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        refuse("REGULAR", f"{path} cannot be opened: {error.strerror}")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse("REGULAR", f"{path} is not a regular file")
    return descriptor


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    if not folder.is_dir():
        with suppress(OSError):  # a run that was killed may have left the older dump beside it
            clear_leftovers(DUMPS, folder.parent, folder.name)
    if not folder.is_dir():
        raise DumpError(f"{folder} is not a folder", "Give the folder that holds manifest.json.")
    if not path.is_file() or path.is_symlink():
        refuse("COMPLETE", f"{folder} has no manifest.json: it is not a dump, or an incomplete one")
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        refuse("JSON", f"{path} has more than {MAX_MANIFEST_BYTES} bytes")
    return data


def _check_file(tensor: StoredTensor, path: Path) -> None:
    index = tensor.index
    descriptor = tensor.open()
    try:
        size = os.fstat(descriptor).st_size
        expected = HEADER_BYTES + index.stored_elements * DTYPES[index.dtype].itemsize
        header = os.pread(descriptor, HEADER_BYTES, 0)
    finally:
        os.close(descriptor)
    if size != expected:
        refuse("SIZE", f"{path} has {counted(size, 'byte')} instead of {expected}")
    try:
        stored, shape = parse_header(header)
    except ValueError as error:
        refuse("HEADER", f"{path} has {error}")
    if (stored, shape) != (index.stored, index.file_shape):
        refuse(
            "HEADER",
            f"{path} declares {stored} {shape} instead of {index.stored} {index.file_shape}",
        )


def read_dump(folder: str | os.PathLike[str]) -> Dump:
    """Open the dump at ``folder``.

    Raises:
        BrokenRuleError: It breaks a rule of the format; the error names the rule and the file.
        DumpError: There is no such folder.
    """
    root = Path(folder)
    manifest = check_manifest(parse_json(_read_manifest(root), root / MANIFEST), root / MANIFEST)
    for phase in PHASES:
        if (root / phase).is_symlink():
            refuse("REGULAR", f"{root / phase} is a link")
    tensors: dict[tuple[Phase, TensorName], StoredTensor] = {}
    for index in manifest.tensors:
        tensor = StoredTensor(root, index)
        _check_file(tensor, root / index.file)
        tensors[index.phase, index.name] = tensor
    steps: dict[tuple[str, int], int] = {
        (step.phase, step.index): i for i, step in enumerate(manifest.steps)
    }
    return Dump(root, manifest, tensors, steps)
