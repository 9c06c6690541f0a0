"""The arithmetic that the formats share: unpack codes, look them up, scale them by groups.

Rows are worked on in blocks that fit a processor's cache, so that a weight needs the memory of its
codes and of the result only.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import torch

from qeff_proxy.errors import CheckpointError

_BLOCK = 1 << 18  # elements
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


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes from 32-bit words: the first in the lowest bits.

    Args:
        words: int32 [rows, words].
        bits: Of a code: 2, 4 or 8.

    Returns:
        uint8 [rows, words · 32 / bits].
    """
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    each = 8 // bits
    codes = torch.empty((data.shape[0], data.shape[1] * each), dtype=torch.uint8)
    for index in range(each):
        codes[:, index::each] = (data >> bits * index) & ((1 << bits) - 1)
    return codes


def unpack_rows(words: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """4-bit codes from 32-bit words, each a column of eight codes.

    Args:
        words: int32 [blocks of eight rows, columns].
        rows: Row within its block of each code in a word, from the lowest bits up.

    Returns:
        uint8 [8 · blocks, columns].
    """
    codes = allocate((words.shape[0], len(rows), words.shape[1]), torch.uint8)
    for begin in range(0, len(words), 8):
        part = slice(begin, begin + 8)
        for index, row in enumerate(rows):
            codes[part, row] = ((words[part] >> 4 * index) & 15).to(torch.uint8)
    return codes.flatten(0, 1)


def look_up(pairs: torch.Tensor, table: torch.Tensor, *, low_first: bool) -> torch.Tensor:
    """The values of 4-bit codes, two in a byte.

    Args:
        pairs: uint8, of any shape.
        table: float32 [16], the value of each code.
        low_first: Whether the first of two codes is in the lower bits.

    Returns:
        float32 [2 · bytes].
    """
    low, high = table.repeat(16), table.repeat_interleave(16)
    both = torch.stack((low, high) if low_first else (high, low), -1)
    # A byte's two values are looked up as one element, which takes half as long as two.
    index = pairs.flatten().to(torch.int32)
    return (
        both.contiguous().view(torch.float64).flatten().index_select(0, index).view(torch.float32)
    )


def to_float32(codes: torch.Tensor) -> torch.Tensor:
    """Codes that are numbers themselves, as float32."""
    if codes.dtype.itemsize > 1 or not codes.is_floating_point():
        return codes.to(torch.float32)
    # A table is three times as fast as PyTorch's conversion of FP8.
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    index = codes.reshape(-1).view(torch.uint8).to(torch.int32)
    return table.index_select(0, index).view(codes.shape)


def scale(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: int | torch.Tensor,
    dtype: torch.dtype,
    zeros: torch.Tensor | int | None = None,
    *,
    columns: int | None = None,
    read: Callable[[torch.Tensor], torch.Tensor] = to_float32,
) -> torch.Tensor:
    """Dequantize a matrix: (code - zero) · scale, computed in float32 and rounded once.

    Args:
        codes: [rows, ...] of any dtype.
        scales: [rows or 1, groups].
        groups: Columns of a group, or int64 [columns]: the group of each.
        dtype: Of the result.
        zeros: [rows or 1, groups], or a number for all; ``None`` for 0.
        columns: Of the result; by default those of ``codes``.
        read: Gives float32 [rows, columns] for some rows of the codes.
    """
    rows = codes.shape[0]
    columns = codes.shape[1] if columns is None else columns
    scales = scales.float().expand(rows, -1)
    if isinstance(groups, int) and columns % groups:
        groups = torch.arange(columns) // groups
    spread = zeros.float().expand(rows, -1) if isinstance(zeros, torch.Tensor) else None
    result = allocate((rows, columns), dtype)
    step = max(1, _BLOCK // max(1, columns))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        values = read(codes[part])
        factors = scales[part]
        shifts = None if spread is None else spread[part]
        if isinstance(groups, torch.Tensor):
            factors = factors.index_select(1, groups)
            shifts = None if shifts is None else shifts.index_select(1, groups)
        else:
            values = values.view(values.shape[0], -1, groups)
            factors = factors.unsqueeze(-1)
            shifts = None if shifts is None else shifts.unsqueeze(-1)
        if shifts is not None:
            values -= shifts
        elif isinstance(zeros, int):
            values -= zeros
        values *= factors
        result[part] = values.view(-1, columns)
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
