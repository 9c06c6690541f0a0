"""The arithmetic that the formats share: unpack codes, look them up, scale them by groups.

Rows are worked on in blocks that fit a processor's cache, and are used as they come, so that a
weight needs the memory of its codes only.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np
import torch

from qeff_proxy.errors import CheckpointError

_BLOCK = 1 << 18  # elements
# A number as a tensor is not converted anew for each block.
_SHIFT = {width: torch.tensor(1 << 8 - width, dtype=torch.int16) for width in (2, 4)}
_BITS = {width: torch.tensor(((1 << width) - 1) * 0x101, dtype=torch.int16) for width in (2, 4)}
# 1,024 and a code in its last bits, as float16; and two of them, from a byte of two 4-bit codes.
_CODE = torch.tensor(0x6400, dtype=torch.int16)
_SPREAD, _TWO, _TWO_CODES = (
    torch.tensor(bits, dtype=torch.int32) for bits in (0x1001, 0xF000F, 0x64006400)
)
_OFFSET = 1024
_TO_FLOAT16 = torch.tensor(128, dtype=torch.int16)
_FLOAT8_BITS = torch.tensor(-0x4001, dtype=torch.int16)
_FLOAT8_SCALE = torch.tensor(256.0)
_LARGE = 1 << 25  # bytes; smaller memory is used again after it was freed


def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without values, in large pages if it is large and there are some.

    The first write to each small page takes longer than the arithmetic on its numbers.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


class Buffers:
    """Memory that is used again, a piece for each dtype."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}
        self._last: dict[torch.dtype, torch.Tensor] = {}

    def get(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor without values; it is that of the last call for this dtype."""
        last = self._last.get(dtype)
        if last is not None and last.shape == shape:
            return last
        count, held = math.prod(shape), self._held.get(dtype)
        if held is None or len(held) < count:
            held = self._held[dtype] = torch.empty(count, dtype=dtype)
        self._last[dtype] = held[:count].view(tuple(shape))
        return self._last[dtype]

    def convert(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values in another dtype, until the next call."""
        if values.dtype == dtype:
            return values
        if values.dtype.itemsize == dtype.itemsize == 2:  # PyTorch converts these one by one
            values = self.get(torch.float32, values.shape).copy_(values)
        return self.get(dtype, values.shape).copy_(values)


#: Writes float32 [rows, columns] for some rows of codes, or float16 for integer ones; returns what
#: is too much in each number.
Reader = Callable[[torch.Tensor, torch.Tensor, Buffers], int]


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Integers [rows, columns] as their bytes, uint8 [rows, bytes]."""
    # A transposed row counts as contiguous, but cannot be viewed.
    return words.flatten().view(torch.uint8).view(len(words), words.shape[1] * words.itemsize)


def unpack(words: torch.Tensor, bits: int, buffers: Buffers | None = None) -> torch.Tensor:
    """Codes from 32-bit words: the first in the lowest bits.

    Args:
        words: int32 [rows, words].
        bits: Of a code: 2, 4 or 8.
        buffers: What the result is in, until they are used again; by default memory of its own.

    Returns:
        uint8 [rows, words · 32 / bits].
    """
    data = as_bytes(words)
    width = 8
    while width > bits:
        # The upper half of each number moves to the byte above, of all numbers at once: two bytes
        # are one element, and no byte is written alone.
        width //= 2
        pairs, moved = (buffers or Buffers()).get(torch.int16, (2, *data.shape))
        torch.mul(pairs.copy_(data), _SHIFT[width], out=moved)
        data = pairs.bitwise_or_(moved).bitwise_and_(_BITS[width]).view(torch.uint8)
        buffers = None  # which hold what is unpacked further
    return data


def unpack_rows(words: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """4-bit codes from 32-bit words, each a column of eight codes.

    Args:
        words: int32 [blocks of eight rows, columns].
        rows: Row within its block of each code in a word, from the lowest bits up.

    Returns:
        uint8 [8 · blocks, columns].
    """
    codes = allocate((words.shape[0], len(rows), words.shape[1]), torch.uint8)
    # In NumPy, whose operations on single bytes are several times as fast.
    data, out = words.contiguous().numpy().view(np.uint8).reshape(*words.shape, 4), codes.numpy()
    for begin in range(0, len(words), 8):
        part = slice(begin, begin + 8)
        for byte, (low, high) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
            pairs = np.ascontiguousarray(data[part, :, byte])
            np.bitwise_and(pairs, 15, out=out[part, low])
            np.right_shift(pairs, 4, out=out[part, high])
    return codes.flatten(0, 1)


def look_up(
    table: torch.Tensor,
    pairs: torch.Tensor,
    out: torch.Tensor,
    buffers: Buffers,
    *,
    low_first: bool,
) -> int:
    """Read 4-bit codes, two in a byte.

    Args:
        table: float32 [16], the value of each code.
        pairs: uint8 [rows, ...].
        out: As `Reader` takes it, as is the next.
        buffers: Memory to use.
        low_first: Whether the first of two codes is in the lower bits.
    """
    low, high = table.repeat(16), table.repeat_interleave(16)
    both = torch.stack((low, high) if low_first else (high, low), -1)
    # A byte's two values are looked up as one element, which takes half as long as two.
    index = buffers.get(torch.int32, (pairs.numel(),)).copy_(pairs.flatten())
    values = both.contiguous().view(torch.float64).flatten()
    torch.index_select(values, 0, index, out=out.view(-1).view(torch.float64))
    return 0


def numbers(codes: torch.Tensor, out: torch.Tensor, buffers: Buffers) -> int:
    """Read codes that are numbers themselves (see `Reader`)."""
    if codes.dtype == torch.uint8 and out.dtype == torch.float16:
        out.view(torch.int16).copy_(codes).bitwise_or_(_CODE)
        return _OFFSET
    if codes.dtype.itemsize > 1 or not codes.is_floating_point():
        out.copy_(codes)
        return 0
    data = codes.contiguous().view(torch.uint8)
    if codes.dtype == torch.float8_e4m3fn and data.numel() and int(data.max()) < 255:
        signed = data.view(torch.int8)
        if int(signed.max()) < 127:
            # Sign, exponent and mantissa move to where float16 has them, whose exponents are 8
            # larger: faster than PyTorch's conversion, and than a table, but blind to NaN (the
            # two codes above).
            moved = buffers.get(torch.int16, data.shape).copy_(signed).mul_(_TO_FLOAT16)
            out.copy_(moved.bitwise_and_(_FLOAT8_BITS).view(torch.float16)).mul_(_FLOAT8_SCALE)
            return 0
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    out.copy_(table.index_select(0, data.flatten().to(torch.int32)).view(codes.shape))
    return 0


def packed(bits: int) -> Reader:
    """A reader of codes packed as `unpack` takes them."""

    def read(words: torch.Tensor, out: torch.Tensor, buffers: Buffers) -> int:
        data = as_bytes(words)
        if bits == 4 and out.dtype == torch.float16 and out.shape[1] == 2 * data.shape[1]:
            pairs = out.view(torch.int32).copy_(data).mul_(_SPREAD)
            pairs.bitwise_and_(_TWO).bitwise_or_(_TWO_CODES)
            return _OFFSET
        return numbers(unpack(words, bits, buffers)[:, : out.shape[1]], out, buffers)

    return read


def scale(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: int | torch.Tensor,
    dtype: torch.dtype,
    zeros: torch.Tensor | int | None = None,
    *,
    columns: int | None = None,
    read: Reader = numbers,
) -> Iterator[torch.Tensor]:
    """Dequantize a matrix: (code - zero) · scale, rounded once.

    Codes of at most a byte and their zero points, which are exact in float16, need no float32 if
    the scales are float16, too.

    Args:
        codes: [rows, ...] of any dtype.
        scales: [rows or 1, groups].
        groups: Columns of a group, or int64 [columns]: the group of each.
        dtype: Of the result.
        zeros: [rows or 1, groups], or a number for all; ``None`` for 0.
        columns: Of the result; by default those of ``codes``.
        read: Reads the codes.

    Yields:
        Blocks of its rows, in order; each until the next is asked for.
    """
    rows = codes.shape[0]
    columns = codes.shape[1] if columns is None else columns
    if isinstance(groups, int) and columns % groups:
        groups = torch.arange(columns) // groups
    small = codes.dtype == (torch.uint8 if read is numbers else torch.int32)
    exact = small and scales.dtype == dtype == torch.float16
    computed = torch.float16 if exact else torch.float32

    def spread(values: torch.Tensor) -> torch.Tensor:
        """For each element, or for each group if all have as many: [rows, groups, 1]."""
        values = values.to(computed).expand(rows, -1)
        return values if isinstance(groups, torch.Tensor) else values.unsqueeze(-1)

    step, buffers = max(1, _BLOCK // max(1, columns)), Buffers()
    shifted = torch.split(spread(zeros), step) if isinstance(zeros, torch.Tensor) else repeat(None)
    blocks = zip(torch.split(codes, step), torch.split(spread(scales), step), shifted, strict=False)
    for block, factors, shifts in blocks:
        values = rows_read = buffers.get(computed, (len(block), columns))
        offset = read(block, rows_read, buffers)
        if isinstance(groups, torch.Tensor):
            factors = factors.index_select(1, groups)
            shifts = None if shifts is None else shifts.index_select(1, groups)
        else:
            values = values.view(len(block), columns // groups, groups)
        if shifts is not None:
            values -= shifts + offset if offset else shifts
        elif isinstance(zeros, int) or offset:
            values -= (zeros or 0) + offset
        values *= factors
        yield buffers.convert(rows_read, dtype)


def join(blocks: Iterable[torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its elements in order, which come in blocks."""
    result = allocate(shape, dtype)
    flat, begin = result.view(-1), 0
    for block in blocks:
        flat[begin : begin + block.numel()] = block.reshape(-1)
        begin += block.numel()
    return result


def group_index(index: torch.Tensor, groups: int, named: str) -> torch.Tensor:
    """The group of each input as int64, if there are such groups.

    Raises:
        CheckpointError: There are not; says ``named``.
    """
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(
            f"{named} names groups {int(index.min())} to {int(index.max())}, where there are "
            f"{groups}",
            "Download the checkpoint again.",
        )
    return index.to(torch.int64)
