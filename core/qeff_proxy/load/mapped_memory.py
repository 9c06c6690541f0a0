"""Weights of a large model that are run, in memory that is not kept.

A weight that must be converted before it can be run is written to a scratch file and mapped from
there, as others are from the checkpoint's files: the system can take such memory back. It counts as
the process's nevertheless once it was read, so its pages are given back after each use. They stay
in the system's cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qeff_proxy.artifact.export_folder import cache_home
from qeff_proxy.common.threads import limit_threads
from qeff_proxy.load.quantized.arithmetic import Buffers
from qeff_proxy.load.weight_sources import map_file

#: Bytes of weights; those of a smaller model stay in memory, which is faster.
LARGE = 1 << 28
_INTERVAL = 0.01  # seconds between two times that pages of a runtime are given back
_LEAST = 1 << 20  # bytes of a tensor whose pages are given back
_BLOCK = 1 << 26  # bytes of a large tensor that are used at a time
_ELEMENTS = 1 << 18  # converted at a time
#: Bits of an entry of ``/proc/self/pagemap``: https://docs.kernel.org/admin-guide/mm/pagemap.html
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def pieces(tensor: torch.Tensor, dtype: torch.dtype, buffers: Buffers) -> Iterator[torch.Tensor]:
    """A tensor's elements in order, converted; the pages that they were read from are given back.

    Yields:
        Pieces that a processor's cache holds; each until the next is asked for.
    """
    for part in torch.split(tensor.detach().contiguous().reshape(-1), _BLOCK // dtype.itemsize):
        for piece in torch.split(part, _ELEMENTS):
            yield buffers.convert(piece, dtype)
        give_back(part)


class Scratch:
    """A file without a name that holds tensors; closed, it goes when the last of them does."""

    def __init__(self) -> None:
        home = cache_home()  # on a disk, as a rule, where the system's folder may be in memory
        self._file = tempfile.TemporaryFile(dir=home if home.is_dir() else None)  # noqa: SIM115
        self._buffers = Buffers()

    def close(self) -> None:
        """Put nothing more into it; its tensors stay."""
        self._file.close()

    def put(
        self, blocks: Iterable[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Write a tensor, whose elements come in blocks of any dtype, and map it.

        Raises:
            OSError: The disk is full.
        """
        unit = mmap.ALLOCATIONGRANULARITY
        begin = self._file.seek(-(-self._file.tell() // unit) * unit)
        with limit_threads():
            for block in blocks:
                for piece in pieces(block, dtype, self._buffers):
                    self._file.write(piece.view(torch.uint8).numpy().data)
        self._file.flush()
        return map_file(self._file.fileno(), begin, shape, dtype)


@contextmanager
def few_pages(*modules: nn.Module) -> Iterator[Callable[[torch.Tensor], None]]:
    """Give the pages of weights back after each use of their module, if the modules are large.

    Of a large matrix, such as a head, they are given back while it is used, too: for a vocabulary
    of 128,000 tokens it has gigabytes.

    Yields:
        Gives back the pages of a tensor that was used otherwise.
    """
    inner = {id(one): one for module in modules for one in module.modules()}.values()
    owned = [(one, tuple(one.parameters(recurse=False))) for one in inner]
    weights = {id(p): p for _, own in owned for p in own if not p.is_meta}.values()
    if sys.platform != "linux" or sum(p.nbytes for p in weights) < LARGE:
        yield lambda _tensor: None
        return
    with ExitStack() as stack:
        for module, own in owned:
            if own:
                handle = module.register_forward_hook(PageHook(own), always_call=True)
                stack.callback(handle.remove)
        stack.enter_context(_InBlocks())
        yield give_back
        for weight in weights:
            give_back(weight)


@dataclass(frozen=True)
class PageHook:
    """A hook of a module that gives pages back, and neither reads nor changes what it computes."""

    weights: tuple[torch.Tensor, ...]

    def __call__(self, *_: Any) -> None:
        """Give the pages of the weights back."""
        for weight in self.weights:
            give_back(weight)


class _InBlocks(TorchFunctionMode):
    """Multiplies by large matrices block by block, of this thread only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``; for a linear layer with a large weight, on some of its rows at a time."""
        weight = args[1] if func is nn.functional.linear and len(args) > 1 else None
        if weight is None or kwargs or weight.is_meta or weight.nbytes < LARGE:
            return func(*args, **(kwargs or {}))
        rows = max(1, _BLOCK * len(weight) // weight.nbytes)
        every = None if len(args) < 3 or args[2] is None else args[2].expand(len(weight))
        parts = []
        for begin in range(0, len(weight), rows):
            part = slice(begin, begin + rows)
            bias = None if every is None else every[part]
            parts.append(func(args[0], weight[part], bias))
            give_back(weight[part])
        return torch.cat(parts, -1)


def give_back(tensor: torch.Tensor) -> None:
    """Give back the pages of a tensor, if a file holds all that is in them."""
    if sys.platform != "linux" or tensor.is_meta or tensor.nbytes < _LEAST:
        return
    begin, storage = tensor.data_ptr(), tensor.untyped_storage()
    # A view may have more elements than its memory, or less.
    _give_back(begin, min(begin + tensor.nbytes, storage.data_ptr() + storage.nbytes()))


@contextmanager
def few_pages_of(folder: Path) -> Iterator[None]:
    """Give pages of the files in a folder back, again and again, while a runtime uses them.

    For a runtime that has mapped them, and keeps the pages of all weights that it read. Files of
    less than `LARGE` bytes are left alone.
    """
    sizes = {str(one.resolve()): one.stat().st_size for one in folder.glob("*.safetensors")}
    if sys.platform != "linux" or sum(sizes.values()) < LARGE:
        yield
        return
    mapped = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, *_, path = line.split(maxsplit=5)
        if path in sizes:
            mapped.append([int(end, 16) for end in place.split("-")])
    done = Event()

    def work() -> None:
        ended = False
        while not ended:
            ended = done.wait(_INTERVAL)
            for begin, end in mapped:
                if end - begin >= _LEAST:
                    _give_back(begin, end)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _give_back(begin: int, end: int) -> None:
    """Give back the pages of an address range, if a file holds all that is in them."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if last <= first:  # less than a page, such as one number that stands for a whole tensor
        return
    with Path("/proc/self/pagemap").open("rb", buffering=0) as table:
        table.seek(first * 8)
        pages = np.frombuffer(table.read((last - first) * 8), np.uint64)
    in_memory, of_file = pages & (_PRESENT | _SWAPPED) != 0, pages & _OF_FILE != 0
    # Memory of the process itself, or a page that somebody wrote to, would be lost.
    if in_memory.any() and of_file[in_memory].all():
        size = (last - first) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(size), mmap.MADV_DONTNEED
        )
