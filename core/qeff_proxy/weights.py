"""Weights in safetensors files that ONNX graphs point into by offset.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, a JSON
header, the data). ONNX external data: a location beside the ``.onnx``, an offset and a length.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from qeff_proxy.trace import TracedPart

__all__ = ["StoredTensor", "point_into", "read_header", "save_weights"]

_IR_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype code, shape, absolute offset, bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def save_weights(path: Path, parts: Iterable[TracedPart]) -> dict[str, StoredTensor]:
    """Write the weights of some parts to one file, each once.

    Tensors that share memory (tied weights) are stored once, whatever their names.

    Args:
        path: The file to write.
        parts: Whose weights to write.

    Returns:
        Where each weight lies, by name; tied weights lie in the same place.
    """
    stored: dict[str, torch.Tensor] = {}
    first_name: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        for name, tensor in part.weights.items():
            storage = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            aliases[name] = first_name.setdefault(storage, name)
            if aliases[name] == name:
                stored[name] = tensor.detach().contiguous()
    save_file(stored, path, metadata={"format": "pt"})
    places = read_header(path)
    return {name: places[alias] for name, alias in aliases.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie.

    Raises:
        ValueError: The file is no safetensors file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path.name} is too short for a safetensors file")
        (header_length,) = struct.unpack("<Q", prefix)
        if header_length > size - 8:
            raise ValueError(f"{path.name} is truncated, or no safetensors file")
        header = json.loads(file.read(header_length))
    start = 8 + header_length
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if start + end > size:
            raise ValueError(
                f"{path.name} is truncated: {name} ends at byte {start + end} of {size}"
            )
        places[name] = StoredTensor(
            entry["dtype"], tuple(entry["shape"]), start + begin, end - begin
        )
    return places


def point_into(
    part: TracedPart, path: Path, places: Mapping[str, StoredTensor]
) -> None:
    """Let the initializers of a traced part point into a weights file beside its ``.onnx``."""
    for name in part.weights:
        place = places[name]
        value = part.model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            path.name,
            place.offset,
            place.length,
            _IR_DTYPES[place.dtype],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=path.parent,
        )
        value.shape = ir.Shape(place.shape)
        value.type = ir.TensorType(_IR_DTYPES[place.dtype])
