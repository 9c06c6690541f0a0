"""``.npy`` and ``.npz`` files, for a driver of one's own.

Each step has a folder ``<group>/<step>/`` with a ``.npy`` per input, or a file
``<group>/<step>.npz``; ``<group>/steps.txt`` lists the steps in order. Outputs are expected at the
same places below ``outputs/``. NumPy has no bfloat16 and no 8-bit floats: their bits are stored as
unsigned integers, and read so; ``pack.json`` knows the dtype.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.device.foreign import npy_header, read_npy
from qeff_proxy.device.index import PackedRun
from qeff_proxy.device.names import file_stem
from qeff_proxy.device.target import Found, Group, Reader, Target, check_within, prepare, raw_size
from qeff_proxy.dump.format import DTYPES, as_values
from qeff_proxy.errors import DumpError

STEPS = "steps.txt"


def _stored(array: NDArray[Any]) -> NDArray[Any]:
    """Elements as NumPy's own dtype."""
    stored = np.dtype(DTYPES[array.dtype.name].stored)
    array = np.ascontiguousarray(array)
    return array if array.dtype == stored else array.view(stored)


def _typed(array: NDArray[Any], run: PackedRun, name: str) -> NDArray[Any]:
    """Bits as the dtype that the index says, where NumPy has none of its own."""
    dtypes = {file_stem(tensor.name): tensor.dtype for tensor in run.outputs}
    dtype = dtypes.get(file_stem(name))
    if dtype is None or DTYPES[dtype].stored != array.dtype.str:
        return array
    return as_values(np.ascontiguousarray(array), dtype)


class NpyTarget(Target):
    """One ``.npy`` per tensor."""

    name = "npy"
    carries_cache = True

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write a folder per step, and ``steps.txt``."""
        for run in group.runs:
            self._write(group.folder, run, read)
        labels = "".join(f"{run.label}\n" for run in group.runs)
        (group.place / STEPS).write_text(labels, encoding="utf-8")
        return [f"# your driver here: the steps of {group.name}/{STEPS}, to outputs/{group.name}"]

    def _write(self, folder: Path, run: PackedRun, read: Reader) -> None:
        place = prepare(folder, run, ".npy")
        for tensor, array in read(run, "in"):
            np.save(place / f"{file_stem(tensor.name)}.npy", _stored(array), allow_pickle=False)

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the files of each step's folder."""
        for run in group.runs:
            place = group.outputs / run.label
            if place.is_dir():
                files = sorted(place.glob("*.npy"))
                yield run, [self._found(run, path, group.outputs) for path in files]

    def _found(self, run: PackedRun, path: Path, root: Path) -> Found:
        check_within(path, root)
        raw_size(path)  # not of a pipe, which would never end

        def load() -> NDArray[Any]:
            return _typed(read_npy(path), run, path.stem)

        with path.open("rb") as file:
            _, shape, _ = npy_header(file, str(path))
        return Found(path.stem, str(path), shape=shape, load=load)


class NpzTarget(NpyTarget):
    """One ``.npz`` per step."""

    name = "npz"

    def _write(self, folder: Path, run: PackedRun, read: Reader) -> None:
        prepare(folder, run, ".npy").rmdir()
        path = folder / run.group / f"{run.label}.npz"
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
            for tensor, array in read(run, "in"):
                member = zipfile.ZipInfo(f"{file_stem(tensor.name)}.npy")
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, _stored(array), allow_pickle=False)

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the members of each step's file."""
        for run in group.runs:
            path = group.outputs / f"{run.label}.npz"
            if path.exists():
                check_within(path, group.outputs)
                raw_size(path)
                yield run, list(_members(path, run))


def _members(path: Path, run: PackedRun) -> Iterator[Found]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                where = f"{member.filename} of {path}"
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    _, shape, _ = npy_header(file, where)
                yield Found(name, where, shape=shape, load=_loader(path, member, where, run, name))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DumpError(f"{path} is not a .npz archive: {error}") from error


def _loader(path: Path, member: zipfile.ZipInfo, where: str, run: PackedRun, name: str) -> Any:
    def load() -> NDArray[Any]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return _typed(_read_member(file, member.file_size, where), run, name)
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
            raise DumpError(f"{where} is damaged: {error}") from error

    return load


def _read_member(file: IO[bytes], size: int, where: str) -> NDArray[Any]:
    dtype, shape, fortran = npy_header(file, where, size)
    data = file.read()
    if len(data) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise DumpError(f"{where} declares {dtype} {shape}, but {len(data)} bytes follow")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
