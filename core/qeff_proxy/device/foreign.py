"""Read ``.npy`` arrays and files that someone else wrote, trusting nothing."""

from __future__ import annotations

import io
import math
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.device.target import check_within, raw_size
from qeff_proxy.dump.format import MAX_RANK
from qeff_proxy.dump.manifest import MAX_ELEMENTS
from qeff_proxy.errors import DumpError

MAX_FOREIGN_BYTES = 2**34
# What NumPy raises on a damaged .npy header, which it tokenizes and evaluates as Python.
_HEADER_FAULTS = (
    ValueError,
    KeyError,
    SyntaxError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_LONGEST_REASON = 200  # NumPy's reasons repeat the whole header


def npy_to_bytes(array: NDArray[Any]) -> bytes:
    """Return ``array`` as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_header(
    file: IO[bytes], where: str, size: int | None = None
) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Return dtype, shape and order that a ``.npy`` header declares; the file is then at the data.

    Args:
        file: At the start of the array.
        where: The file, for messages.
        size: Of the array with its header, in bytes, where known; checked.

    Raises:
        DumpError: It is not a header, holds objects, or declares more than there is.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    except _HEADER_FAULTS as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise DumpError(f"{where} is not a .npy array: {reason}") from error
    plain = not (dtype.hasobject or dtype.names or dtype.subdtype) and dtype.itemsize
    sizes = len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**53 for n in shape)
    if not (plain and sizes) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise DumpError(
            f"{where} declares {str(dtype)[:_LONGEST_REASON]} {str(shape)[:_LONGEST_REASON]}, "
            "which no dump can hold"
        )
    remaining = None if size is None else size - file.tell()
    if remaining is not None and math.prod(shape) * dtype.itemsize != remaining:
        raise DumpError(f"{where} declares {dtype} {shape}, but {remaining} bytes follow")
    return dtype, shape, fortran


def npy_from_bytes(data: bytes, where: str) -> NDArray[Any]:
    """Return the array in the bytes of a ``.npy`` file.

    Raises:
        DumpError: It is not one, holds objects, or declares more than it has.
    """
    buffer = io.BytesIO(data)
    dtype, shape, fortran = npy_header(buffer, where, len(data))
    flat = np.frombuffer(data, dtype, offset=buffer.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def read_npy(path: Path) -> NDArray[Any]:
    """Map the array of a ``.npy`` file into memory.

    Raises:
        DumpError: It is not one, holds objects, or its size is not what it declares.
    """
    size = raw_size(path)
    with path.open("rb") as file:
        dtype, shape, fortran = npy_header(file, str(path), size)
        offset = file.tell()
    order: Any = "F" if fortran else "C"
    if not math.prod(shape):
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", offset, shape, order)


def read_limited(path: Path, root: Path) -> bytes:
    """Return the bytes of a regular file within ``root``.

    Raises:
        DumpError: It lies outside of ``root``, is not a regular file, or is too large.
    """
    check_within(path, root)
    if raw_size(path) > MAX_FOREIGN_BYTES:
        raise DumpError(f"{path} has more than {MAX_FOREIGN_BYTES} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error
