"""Read where the tensors of a safetensors file lie, without reading them.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, a JSON
header, the data).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["StoredTensor", "read_header"]


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
        places[name] = StoredTensor(entry["dtype"], shape, start + begin, end - begin)
    return places
