"""The ``.npy`` header (NEP 1, version 1.0), written at a fixed size and read back strictly."""

from __future__ import annotations

import ast
import struct
from collections.abc import Sequence

from qeff_proxy.dump.format import HEADER_BYTES

_MAGIC = b"\x93NUMPY\x01\x00"


def build_header(stored: str, shape: Sequence[int]) -> bytes:
    """Return the `HEADER_BYTES` bytes that precede C-ordered data of ``stored`` dtype.

    Args:
        stored: numpy's dtype string, such as ``<f4``.
        shape: Of the whole file's array.
    """
    text = repr({"descr": stored, "fortran_order": False, "shape": tuple(shape)})
    room = HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + struct.pack("<H", room) + text.encode("ascii").ljust(room - 1) + b"\n"


def parse_header(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Return the dtype string and shape that the first `HEADER_BYTES` of a file declare.

    Raises:
        ValueError: They are not exactly what `build_header` writes for that dtype and shape.
    """
    if len(data) < HEADER_BYTES or not data.startswith(_MAGIC):
        raise ValueError("not a version 1.0 .npy header of the fixed size")
    try:
        fields = ast.literal_eval(data[len(_MAGIC) + 2 :].decode("ascii").strip())
        stored, shape = fields["descr"], fields["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("an unreadable .npy header") from error
    if not isinstance(stored, str) or not isinstance(shape, tuple):
        raise ValueError("a .npy header of a structured or object array")  # noqa: TRY004
    if not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 16:
        raise ValueError("a .npy header with an impossible shape")
    if build_header(stored, shape) != data:
        raise ValueError("a .npy header that is not canonical (Fortran order, or extra fields)")
    return stored, shape
