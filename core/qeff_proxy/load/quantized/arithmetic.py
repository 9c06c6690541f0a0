"""The arithmetic that the formats share: unpack codes, look them up, scale them by groups.

Rows are worked on in blocks that fit a processor's cache, so that a weight needs the memory of its
codes and of the result only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qeff_proxy.errors import CheckpointError

_BLOCK = 1 << 18  # elements


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
    codes = torch.empty((words.shape[0], len(rows), words.shape[1]), dtype=torch.uint8)
    for index, row in enumerate(rows):
        codes[:, row] = ((words >> 4 * index) & 15).to(torch.uint8)
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


def scale(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: int | torch.Tensor,
    dtype: torch.dtype,
    zeros: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Dequantize a matrix: (code - zero) · scale, computed in float32 and rounded once.

    Args:
        codes: [rows, columns] of any dtype.
        scales: [rows or 1, groups].
        groups: Columns of a group, or int64 [columns]: the group of each.
        dtype: Of the result.
        zeros: [rows or 1, groups], or a number for all; ``None`` for 0.
    """
    rows, columns = codes.shape
    scales = scales.float().expand(rows, -1)
    if isinstance(groups, int) and columns % groups:
        groups = torch.arange(columns) // groups
    spread = zeros.float().expand(rows, -1) if isinstance(zeros, torch.Tensor) else None
    result = torch.empty((rows, columns), dtype=dtype)
    step = max(1, _BLOCK // max(1, columns))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        values = codes[part].to(torch.float32)
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
