"""One tensor of a dump as it is written: an open ``.npy`` file and the index of its records."""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump.format import DTYPES, HEADER_BYTES, MAX_RANK, dtype_name, step_label
from qeff_proxy.dump.npy import build_header
from qeff_proxy.errors import DumpError

if TYPE_CHECKING:
    from qeff_proxy.dump.format import Phase, TensorName


#: Bytes of a tensor that are read and written at a time.
_BLOCK_BYTES = 1 << 24


def runs_of(numbers: array[int]) -> list[list[int]]:
    """Return rising ``numbers`` as half-open runs: 0, 1, 2, 5 is ``[[0, 3], [5, 6]]``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _blocks(tensor: NDArray[Any]) -> Iterator[memoryview]:
    """Yield the little-endian bytes of a tensor in C order, some MiB at a time.

    Of a file that is mapped into memory, the pages that were read are released.
    """
    if tensor.nbytes <= _BLOCK_BYTES or tensor.ndim == 0:
        order = tensor.dtype.byteorder
        if order == ">" or (order == "=" and sys.byteorder == "big"):
            tensor = tensor.astype(tensor.dtype.newbyteorder("<"))
        yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        return
    rows = _BLOCK_BYTES // tensor[0].nbytes
    for at in range(0, len(tensor), max(rows, 1)):
        yield from _blocks(tensor[at : at + rows] if rows else tensor[at])
        _release(tensor)


def _release(tensor: NDArray[Any]) -> None:
    """Let go of the pages of a read-only mapping; of others they may hold changes."""
    base: Any = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    with memoryview(base) as view:
        readonly = view.readonly
    if readonly:
        base.madvise(mmap.MADV_DONTNEED)


class TensorStream:
    """Appends the records of one tensor in one phase to one file.

    Attributes:
        name: Whose records these are.
        delta: The records are the cache rows that each step added.
        constant: An input that does not change within a phase: unchanged records are not repeated.
        rows_of: The output that already holds every element, so that nothing is written, or None.
    """

    def __init__(self, folder: Path, phase: Phase, name: TensorName, graph_name: str) -> None:
        self.name = name
        self.phase = phase
        self.graph_name = graph_name
        self.delta = False
        self.constant = False
        self.rows_of: TensorName | None = None
        self.dtype: str | None = None
        self.descriptor: int | None = None
        self.path = folder / phase / f"{name}.npy"
        self._positions = array("Q")
        self._checksums = array("L")
        self._repeats = array("Q")
        self._elements = 0
        self._shape: tuple[int, ...] = ()
        self._shapes: list[tuple[int, ...]] | None = None
        self._latest: NDArray[Any] | None = None

    @property
    def started(self) -> bool:
        """Whether a record has been written."""
        return bool(self._positions)

    def append(
        self, position: int, index: int, tensor: NDArray[Any], true_dtype: str | None, keep: bool
    ) -> None:
        """Write the record of one step.

        Args:
            position: Of the step among the steps of the manifest.
            index: Of the step within its phase, for errors.
            tensor: The elements.
            true_dtype: The elements' dtype when numpy cannot say, or None.
            keep: Whether the file may stay open after the record.

        Raises:
            DumpError: The dtype changed or cannot be dumped, or the rank is too large.
            OSError: The file cannot be written.
        """
        if self._latest is tensor and self.constant:
            self._repeat(position)
            return
        where = f"{self.name} of {step_label(self.phase, index)}"
        dtype = dtype_name(tensor, true_dtype, where)
        if self.dtype is None:
            self.dtype = dtype
        elif self.dtype != dtype:
            raise DumpError(f"{where} is {dtype} but was {self.dtype} in the steps before")
        if tensor.ndim > MAX_RANK:
            raise DumpError(f"{where} has {tensor.ndim} dimensions; {MAX_RANK} can be dumped")
        checksum = 0
        if self.constant:
            for data in _blocks(tensor):
                checksum = zlib.crc32(data, checksum)
            self._latest = tensor
            if self._same_as_previous(tensor.shape, checksum):
                self._repeat(position)
                return
            checksum = 0
        descriptor = self._open()
        for data in _blocks(tensor):
            checksum = zlib.crc32(data, checksum)
            _write_all(descriptor, data)
        if not keep:
            self.close()
        self._add(position, tensor.shape, checksum)
        self._elements += tensor.size

    def _same_as_previous(self, shape: tuple[int, ...], checksum: int) -> bool:
        if not self._checksums:
            return False
        previous = self._shapes[-1] if self._shapes is not None else self._shape
        return self._checksums[-1] == checksum and previous == shape

    def _repeat(self, position: int) -> None:
        self._repeats.append(len(self._positions))
        previous = self._shapes[-1] if self._shapes is not None else self._shape
        self._add(position, previous, self._checksums[-1])

    def _add(self, position: int, shape: tuple[int, ...], checksum: int) -> None:
        if not self._positions:
            self._shape = shape
        elif self._shapes is not None:
            self._shapes.append(shape)
        elif shape != self._shape:
            self._shapes = [self._shape] * len(self._positions)
            self._shapes.append(shape)
        self._positions.append(position)
        self._checksums.append(checksum)

    def _open(self) -> int:
        if self.descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            if not self._positions:
                self.path.parent.mkdir(exist_ok=True)
                flags |= os.O_EXCL
            self.descriptor = os.open(self.path, flags, 0o666)
            if not self._positions:
                # Valid and empty until the number of records is known.
                header = build_header(DTYPES[self.dtype or ""].stored, (0,))
                _write_all(self.descriptor, memoryview(header))
        return self.descriptor

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        if self.descriptor is not None:
            descriptor, self.descriptor = self.descriptor, None
            os.close(descriptor)

    def finish(self) -> dict[str, Any]:
        """Complete the header and return the entry of the manifest."""
        self.close()
        info = DTYPES[self.dtype or ""]
        stored = len(self._positions) - len(self._repeats)
        shape = (stored, *self._shape) if self._shapes is None else (self._elements,)
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            header = build_header(info.stored, shape)
            if len(header) != HEADER_BYTES or os.pwrite(descriptor, header, 0) != HEADER_BYTES:
                raise DumpError(f"the header of {self.name} was not written whole")
        finally:
            os.close(descriptor)
        return self._entry(info.stored)

    def _entry(self, stored: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "name": str(self.name),
            "phase": self.phase,
            "file": f"{self.phase}/{self.name}.npy",
            "part": self.name.part,
            "direction": self.name.direction,
            "tensor": self.name.tensor,
            "layer": self.name.layer,
            "graph_name": self.graph_name,
            "dtype": self.dtype,
            "stored": stored,
            "kv": "delta" if self.delta else None,
            "steps": runs_of(self._positions),
        }
        if self._shapes is None:
            entry["shape"] = list(self._shape)
        else:
            entry["shapes"] = [list(shape) for shape in self._shapes]
        if self._repeats:
            entry["repeats"] = runs_of(self._repeats)
        entry["crc32"] = "".join(f"{checksum:08x}" for checksum in self._checksums)
        return entry
