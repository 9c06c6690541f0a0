"""Messages between two processes: JSON values and arrays, over a pipe.

A message is eight bytes of length, a JSON header of that length, and the bytes of the arrays that
the header's ``arrays`` describe. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype

__all__ = ["end_process", "read_message", "write_message"]

_LENGTH = struct.Struct("<Q")


def write_message(
    stream: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None
) -> None:
    """Write a message.

    Args:
        stream: Where to.
        header: JSON values.
        arrays: Go with it, by name.
    """
    flat = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    shapes = {name: list(np.shape(array)) for name, array in (arrays or {}).items()}
    places = [[name, array.dtype.name, shapes[name]] for name, array in flat.items()]
    text = json.dumps({**header, "arrays": places}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in flat.values():
        if array.nbytes:
            stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_message` wrote.

    Raises:
        EOFError: The other side is gone.
    """
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    header: dict[str, Any] = json.loads(_read(stream, length))
    arrays: dict[str, Array] = {}
    for name, dtype, shape in header.pop("arrays"):
        array = np.empty(shape, numpy_dtype(dtype))
        if array.nbytes:
            data = _read(stream, array.nbytes)
            array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        arrays[name] = array
    return header, arrays


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes to a process, which ends it; kill it if it does not within five seconds."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data
