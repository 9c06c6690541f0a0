"""Weights in safetensors files that ONNX graphs point into by offset.

ONNX external data: a location beside the ``.onnx``, an offset and a length. A weight that is a
tensor of the checkpoint is copied from file to file in pieces; one of another dtype is converted
piece by piece; one that is made of several tensors is made together with its layer. Each piece is
hashed, checked for NaN and written while it is in the processor's cache, so that nothing is read
twice.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from qeff_proxy.arrays import dtype_name
from qeff_proxy.artifact.hashes import name_digest, new_digest
from qeff_proxy.common.direct_io import PIECE, FileReader, FileWriter
from qeff_proxy.common.threads import limit_threads
from qeff_proxy.errors import ArtifactError, CheckpointError
from qeff_proxy.load.mapped_memory import pieces
from qeff_proxy.load.quantized.arithmetic import Buffers
from qeff_proxy.load.safetensors_header import TORCH_DTYPES, StoredTensor
from qeff_proxy.load.weight_sources import (
    ComputedWeight,
    StoredWeight,
    Weight,
    WeightSources,
    map_tensor,
)

if TYPE_CHECKING:
    from qeff_proxy.export.trace.trace_part import TracedPart

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
_CODES = {name: code for code, name in TORCH_DTYPES.items()}
_ZEROS = memoryview(bytes(PIECE))


@dataclass(frozen=True)
class SavedWeights:
    """What `save_weights` wrote.

    Attributes:
        places: Where each weight lies, by name; tied weights have the same place.
        digest: Hash of the file that was written, as in ``export.json``; ``None`` if all weights
            are in linked files, which are not read.
    """

    places: dict[str, StoredWeight]
    digest: str | None


def save_weights(
    path: Path,
    parts: Iterable[TracedPart],
    sources: WeightSources | None = None,
    *,
    reference: bool = False,
) -> SavedWeights:
    """Write the weights of some parts to one file, each once; hash them, and look for NaN.

    Tensors that share memory (tied weights) are stored once, whatever their names.

    Args:
        path: The file to write.
        parts: Their weights are written; those on the meta device come from ``sources``.
        sources: Where the weights of the model come from; without any, all are in memory.
        reference: Do not copy weights that are tensors of the checkpoint, but link its files beside
            the one to write, which then holds all other weights, if any.

    Raises:
        ArtifactError: The checkpoint's files cannot be linked.
        CheckpointError: A weight has NaN elements; names it and the file it came from.
    """
    sources = sources or WeightSources()
    stored, aliases = _distinct(parts)
    linked: dict[str, StoredWeight] = {}
    for name in list(stored) if reference else ():
        found = sources.find(name)
        if isinstance(found, StoredWeight) and _is_same(found, stored[name]):
            linked[name] = replace(found, path=_link(found.path, path.parent))
            del stored[name]
    digest = None
    if stored:
        places, header = _layout(stored)
        with limit_threads():
            digest = _write_file(path, header, places, stored, sources)
        linked.update({name: StoredWeight(path, name, place) for name, place in places.items()})
    return SavedWeights({name: linked[alias] for name, alias in aliases.items()}, digest)


def _write_file(
    path: Path,
    header: bytes,
    places: Mapping[str, StoredTensor],
    stored: Mapping[str, torch.Tensor],
    sources: WeightSources,
) -> str:
    """Write a weights file from its beginning to its end; return its hash."""
    size = len(header) + sum(place.length for place in places.values())
    made: dict[str, torch.Tensor] = {}  # weights of a layer that are not written yet
    absent = [
        name
        for name in places
        if stored[name].is_meta and not _has_shape(sources.find(name), stored[name])
    ]
    layers = sources.make_layers(absent)
    with ExitStack() as stack:
        sink = _Sink(stack.enter_context(FileWriter(path, size)))
        sink.put(header)
        readers: dict[Path, FileReader] = {}
        for name in places:
            tensor, found = stored[name], sources.find(name)
            look = _NanFinder(name, sources, tensor.dtype)
            if isinstance(found, StoredWeight) and _is_same(found, tensor):
                if found.path not in readers:
                    readers[found.path] = stack.enter_context(FileReader(found.path))
                _pour(readers[found.path], found.place, sink, look)
                continue
            if isinstance(found, ComputedWeight) and tensor.is_meta and _has_shape(found, tensor):
                for block in found.blocks():
                    _put_tensor(block, sink, look)
                continue
            if isinstance(found, StoredWeight) and _has_shape(found, tensor):
                tensor = found.read()
            elif tensor.is_meta:
                while name not in made:
                    made.update(next(layers))
                tensor = made.pop(name)
            _put_tensor(tensor, sink, look)
        return sink.finish()


class _Sink:
    """Hashes the bytes of a file in order, and writes them if it has a writer."""

    def __init__(self, writer: FileWriter | None = None) -> None:
        self._writer = writer
        self._digest = new_digest()
        self.buffers = Buffers()

    def put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        if self._writer is not None:
            self._writer.write(data)

    def skip(self, count: int) -> None:
        """Take zeros, which become a hole in the file that is written."""
        for begin in range(0, count, PIECE):
            self._digest.update(_ZEROS[: count - begin])
        if self._writer is not None:
            self._writer.skip(count)

    def finish(self) -> str:
        if self._writer is not None:
            self._writer.finish()
        return name_digest(self._digest)


@dataclass(frozen=True)
class _NanFinder:
    """Refuses NaN elements in pieces of a weight."""

    name: str
    sources: WeightSources
    dtype: torch.dtype

    def look(self, piece: torch.Tensor) -> None:
        if self.dtype.is_floating_point and _has_nan(piece):
            raise CheckpointError(
                f"{self.name} of {self.sources.file_of(self.name) or 'the model'} has NaN elements",
                "Download the checkpoint again; a model with such weights gives only NaN.",
            )


def _pour(reader: FileReader, place: StoredTensor, sink: _Sink, nan: _NanFinder) -> None:
    """Copy a tensor's bytes from one file to another; holes of the file stay holes."""
    begin, end = place.offset, place.offset + place.length
    aligned = begin % 8 == 0  # only then are pieces whole elements
    for data, start, stop in reader.spans(begin, end):
        if not data and aligned:
            sink.skip(stop - start)
            continue
        for piece in reader.pieces(start, stop):
            sink.put(piece)
            if aligned:
                nan.look(torch.frombuffer(piece, dtype=nan.dtype))
    if not aligned and place.length:
        nan.look(map_tensor(StoredWeight(reader.path, nan.name, place)))


def _is_same(found: StoredWeight, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the checkpoint equals the weight byte for byte."""
    code = _CODES[dtype_name(tensor.dtype)]
    return found.dtype == code and _has_shape(found, tensor)


def _has_shape(found: Weight | None, tensor: torch.Tensor) -> bool:
    return found is not None and found.shape == tuple(tensor.shape)


def _link(file: Path, folder: Path) -> Path:
    """Link a checkpoint's file into ``folder``."""
    link = folder / file.name
    if not link.exists():
        try:
            os.link(file.resolve(), link)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
                raise
            raise ArtifactError(
                f"{file} cannot be linked into {folder.parent}: {error.strerror}",
                "A reference needs the export on the checkpoint's own file system (--output); or "
                "copy the weights (--weights copy).",
            ) from error
    return link


def _distinct(parts: Iterable[TracedPart]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors to store, by name; and each weight's name → the name that it is stored by."""
    stored: dict[str, torch.Tensor] = {}
    first_name: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        for name, tensor in part.weights.items():
            address = id(tensor) if tensor.is_meta else tensor.data_ptr()
            storage = (address, tensor.dtype, tuple(tensor.shape), tensor.stride())
            aliases[name] = first_name.setdefault(storage, name)
            if aliases[name] == name:
                stored[name] = tensor
    return stored, aliases


def _layout(stored: Mapping[str, torch.Tensor]) -> tuple[dict[str, StoredTensor], bytes]:
    """Where each tensor will lie, and the file's header.

    In the order in which safetensors writes: wide dtypes first, so that all are aligned.
    """
    order = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    end = 0
    for name in order:
        tensor = stored[name]
        code = _CODES[dtype_name(tensor.dtype)]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        spans[name] = (code, tuple(tensor.shape), begin, end - begin)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return {
        name: StoredTensor(code, shape, len(header) + begin, length)
        for name, (code, shape, begin, length) in spans.items()
    }, header


def _put_tensor(tensor: torch.Tensor, sink: _Sink, nan: _NanFinder) -> None:
    """Write a tensor piece by piece, converted if need be."""
    for piece in pieces(tensor, nan.dtype, sink.buffers):
        sink.put(piece.view(torch.uint8).numpy().data)
        nan.look(piece)


def check_and_hash(
    path: Path, places: Mapping[str, StoredTensor], sources: WeightSources | None = None
) -> str:
    """Read a weights file once, in small pieces: hash it and check its weights for NaN.

    Args:
        path: The file.
        places: Where each weight lies.
        sources: Where the weights come from, for the error.

    Raises:
        CheckpointError: A weight has NaN elements; names it and the file it came from.
    """
    sources = sources or WeightSources()
    sink = _Sink()
    spans = sorted((place.offset, name) for name, place in places.items())
    with limit_threads(), FileReader(path) as reader:
        position = 0
        for offset, name in spans:
            if offset < position:  # a tied weight, checked already
                continue
            for piece in reader.pieces(position, offset):
                sink.put(piece)
            place = places[name]
            dtype = getattr(torch, TORCH_DTYPES[place.dtype])
            _pour(reader, place, sink, _NanFinder(name, sources, dtype))
            position = offset + place.length
        for piece in reader.pieces(position, reader.size):
            sink.put(piece)
    return sink.finish()


def _has_nan(piece: torch.Tensor) -> bool:
    if piece.dtype.itemsize == 1:
        piece = piece.float()
    # A sum is one fast pass, and is finite unless an element is not, or it is too large for the
    # dtype; only then is each element checked.
    return not math.isfinite(piece.sum().item()) and bool(torch.isnan(piece).any())


def point_into(part: TracedPart, places: Mapping[str, StoredWeight]) -> None:
    """Point the initializers of a traced part into weights files beside its ``.onnx``."""
    for name in part.weights:
        place, path = places[name].place, places[name].path
        value = part.model.graph.initializers[name]
        dtype, shape = _IR_DTYPES[place.dtype], ir.Shape(place.shape)
        if value.dtype == ir.DataType.UINT4 and isinstance(value.shape, ir.Shape):
            dtype, shape = value.dtype, value.shape  # two in a byte of the file
        value.const_value = ir.ExternalTensor(
            *(path.name, place.offset, place.length, dtype),
            shape=shape,
            name=name,
            base_dir=path.parent,
        )
        value.shape = shape
        value.type = ir.TensorType(dtype)
