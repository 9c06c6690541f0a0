"""Weights in safetensors files that ONNX graphs point into by offset.

ONNX external data: a location beside the ``.onnx``, an offset and a length.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import onnx_ir as ir
from safetensors.torch import save_file

from qeff_proxy.safetensors_file import read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from qeff_proxy.safetensors_file import StoredTensor
    from qeff_proxy.trace import TracedPart

__all__ = ["point_into", "save_weights"]

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
    # safetensors makes the file for its owner alone: give it the mode of a new file instead.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    places = read_header(path)
    return {name: places[alias] for name, alias in aliases.items()}


def point_into(part: TracedPart, path: Path, places: Mapping[str, StoredTensor]) -> None:
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
