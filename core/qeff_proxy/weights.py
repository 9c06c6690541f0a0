"""Weights in safetensors files that ONNX graphs point into by offset.

ONNX external data: a location beside the ``.onnx``, an offset and a length. A weight that is a
tensor of the checkpoint goes from file to file within the kernel; one of another dtype is converted
piece by piece; one that is made of several tensors is made with its layer. None is ever in memory
longer than it takes to write it.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from qeff_proxy.artifact import name_digest, new_digest
from qeff_proxy.errors import ArtifactError, CheckpointError
from qeff_proxy.safetensors_file import TORCH_DTYPES, StoredTensor
from qeff_proxy.weight_sources import StoredWeight, WeightSources, map_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from qeff_proxy.trace import TracedPart

__all__ = ["check_and_hash", "point_into", "save_weights"]

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
_PIECE = 1 << 22  # elements, or bytes, that are in memory at a time
_READ = 1 << 20  # bytes that are read, hashed and looked at while the processor has them at hand
#: Of ``copy_file_range``: another file system, or one that cannot.
_UNABLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


def save_weights(
    path: Path,
    parts: Iterable[TracedPart],
    sources: WeightSources | None = None,
    *,
    reference: bool = False,
) -> dict[str, StoredWeight]:
    """Write the weights of some parts to one file, each once.

    Tensors that share memory (tied weights) are stored once, whatever their names.

    Args:
        path: The file to write.
        parts: Whose weights to write. Those on the meta device come from ``sources``.
        sources: Where the weights of the model come from; without any, all are in memory.
        reference: Do not copy weights that are tensors of the checkpoint, but link its files beside
            the one to write, which then holds what is left, if anything.

    Returns:
        Where each weight lies, by name; tied weights lie in the same place.

    Raises:
        ArtifactError: The checkpoint's files cannot be linked.
    """
    sources = sources or WeightSources()
    stored, aliases = _distinct(parts)
    linked: dict[str, StoredWeight] = {}
    for name in list(stored) if reference else ():
        found = sources.find(name)
        if found is not None and _is_same(found, stored[name]):
            linked[name] = replace(found, path=_link(found.path, path.parent))
            del stored[name]
    if not stored:
        return {name: linked[alias] for name, alias in aliases.items()}
    places, header = _layout(stored)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(place.length for place in places.values()))
        absent = []
        for name, tensor in stored.items():
            found = sources.find(name)
            if found is not None and _is_same(found, tensor):
                _copy(found, file.fileno(), places[name].offset)
            elif found is not None and found.place.shape == tuple(tensor.shape):
                _write(map_tensor(found), tensor.dtype, file.fileno(), places[name].offset)
            elif tensor.is_meta:
                absent.append(name)
            else:
                _write(tensor.detach(), tensor.dtype, file.fileno(), places[name].offset)
        for made in sources.make_layers(absent):
            for name, tensor in made.items():
                _write(tensor, stored[name].dtype, file.fileno(), places[name].offset)
    linked.update({name: StoredWeight(path, name, place) for name, place in places.items()})
    return {name: linked[alias] for name, alias in aliases.items()}


def _is_same(found: StoredWeight, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the checkpoint is the weight, byte for byte."""
    code = _CODES[str(tensor.dtype).removeprefix("torch.")]
    return found.place.dtype == code and found.place.shape == tuple(tensor.shape)


def _link(file: Path, folder: Path) -> Path:
    """Give a checkpoint's file a second name in ``folder``."""
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
    """The tensors to store by name; and for each name, the one that it is stored under."""
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
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
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


def _write(tensor: torch.Tensor, dtype: torch.dtype, target: int, offset: int) -> None:
    """Write a tensor piece by piece, converted where need be."""
    flat = tensor.contiguous().reshape(-1)
    for begin in range(0, flat.numel(), _PIECE):
        piece = flat[begin : begin + _PIECE].to(dtype).contiguous()
        left = piece.view(torch.uint8).numpy().data
        while left:
            written = os.pwrite(target, left, offset)
            left, offset = left[written:], offset + written


def _copy(stored: StoredWeight, target: int, offset: int) -> None:
    """Copy a tensor's bytes within the kernel where it can; holes of the file stay holes."""
    with stored.path.open("rb") as file:
        source = file.fileno()
        begin, end = stored.place.offset, stored.place.offset + stored.place.length
        status = os.fstat(source)
        sparse = status.st_blocks * 512 < status.st_size
        position = begin
        while position < end:
            stop = end
            if sparse:
                try:
                    position = os.lseek(source, position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:  # nothing but a hole is left
                        return
                    raise
                stop = min(end, os.lseek(source, position, os.SEEK_HOLE))
            _copy_range(source, position, target, offset + position - begin, stop - position)
            position = max(stop, position)


def _copy_range(source: int, begin: int, target: int, offset: int, count: int) -> None:
    while count > 0:
        try:
            done = os.copy_file_range(source, target, count, begin, offset)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _UNABLE:
                raise
            done = os.pwrite(target, os.pread(source, min(count, _PIECE), begin), offset)
        if done == 0:
            raise OSError(errno.EIO, "the checkpoint became shorter while it was copied")
        begin, offset, count = begin + done, offset + done, count - done


def check_and_hash(
    path: Path, places: Mapping[str, StoredTensor], sources: WeightSources | None = None
) -> str:
    """Read a weights file once, in small pieces: its hash, and whether any weight is NaN.

    Args:
        path: The file.
        places: Where each weight lies.
        sources: Where they come from, for the error.

    Raises:
        CheckpointError: A weight has NaN elements; names it and the file it came from.
    """
    with _one_thread():
        return _check_and_hash(path, places, sources)


def _check_and_hash(
    path: Path, places: Mapping[str, StoredTensor], sources: WeightSources | None
) -> str:
    digest = new_digest()
    buffer = torch.empty(_READ, dtype=torch.uint8)
    view = buffer.numpy().data
    spans = sorted((place.offset, place.length, name) for name, place in places.items())
    with path.open("rb", buffering=0) as file:
        position = 0

        def take(count: int) -> torch.Tensor:
            nonlocal position
            filled = 0
            while filled < count:
                got = file.readinto(view[filled:count])
                if not got:
                    raise OSError(errno.EIO, f"{path} became shorter while it was read")
                filled += got
            digest.update(view[:count])
            position += count
            return buffer[:count]

        for offset, length, name in spans:
            if offset < position:  # a tied weight, seen already
                continue
            while position < offset:
                take(min(_READ, offset - position))
            dtype = getattr(torch, TORCH_DTYPES[places[name].dtype])
            while position < offset + length:
                piece = take(min(_READ, offset + length - position))
                if dtype.is_floating_point and _has_nan(piece.view(dtype)):
                    source = (sources.file_of(name) if sources is not None else None) or "the model"
                    raise CheckpointError(
                        f"{name} of {source} has NaN elements",
                        "Download the checkpoint again; a model with such weights gives only NaN.",
                    )
    return name_digest(digest)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch sum small pieces in this thread: waiting for others would take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _has_nan(piece: torch.Tensor) -> bool:
    if piece.dtype.itemsize == 1:
        piece = piece.float()
    # A sum is one fast pass, and finite unless something is not; only then is it worth a look.
    # (Narrow types are summed in float32, but the total may be too large for them: a look, too.)
    total = piece.sum()
    return not bool(torch.isfinite(total)) and bool(torch.isnan(piece).any())


def point_into(part: TracedPart, places: Mapping[str, StoredWeight]) -> None:
    """Let the initializers of a traced part point into weights files beside its ``.onnx``."""
    for name in part.weights:
        place, path = places[name].place, places[name].path
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
