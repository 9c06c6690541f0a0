"""Read where the tensors of a safetensors file lie, without reading them.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, a JSON
header, the data).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

#: The format's dtypes and torch's names for them.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "BOOL": 1,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype code, shape, absolute offset, bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie.

    Raises:
        ValueError: The file is no safetensors file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("too short for a safetensors file")
        (header_length,) = struct.unpack("<Q", prefix)
        if header_length > size - 8:
            raise ValueError("truncated, or no safetensors file")
        header = json.loads(file.read(header_length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors file: its header is no JSON object")  # noqa: TRY004
    start = 8 + header_length
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end:
            raise ValueError(f"{name} has offsets {begin} to {end}")
        if start + end > size:
            raise ValueError(f"truncated: {name} ends at byte {start + end} of {size}")
        shape = tuple(int(axis) for axis in entry["shape"])
        if entry["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"{name} has dtype {entry['dtype']!r}, which is not known")
        bytes_needed = math.prod(shape) * _BYTES[entry["dtype"]]
        if bytes_needed != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes, but its shape takes {bytes_needed}")
        places[name] = StoredTensor(entry["dtype"], shape, start + begin, end - begin)
    return places
