"""Weights whose codes are stored one by one (FP8, int8), with scales by tensor, row or block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from qeff_proxy.load.quantized.arithmetic import scale
from qeff_proxy.load.quantized.pieces import FLOATS, Pieces
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.weight_sources import StoredWeight


def scale_shapes(shape: Sequence[int], block: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The shapes that scales of codes may have.

    Args:
        shape: Of the codes, [..., rows, columns].
        block: Rows and columns that share a scale; ``None`` for one scale a tensor or row. Blocks
            at the lower and right edge may be smaller.
    """
    *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
    if block:
        return [(*outer, math.ceil(rows / block[0]), math.ceil(columns / block[1]))]
    return [(), (1,), (*outer, 1, 1), (*outer, rows), (*outer, rows, 1)]


def activation_keys(base: str) -> list[str]:
    """What a checkpoint stores for a module's activations, which stay float here."""
    ends = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
    return [f"{base}.{end}" for end in (*ends, "activation_scale", "k_scale", "v_scale")]


def replace_scaled(
    pieces: Pieces,
    key: str,
    codes: StoredWeight,
    block: Sequence[int] | None = None,
    dtype: str | None = None,
    *,
    zeros: bool = False,
) -> None:
    """Replace the codes of a weight, its scales and its zero points.

    Args:
        pieces: The checkpoint's tensors.
        key: The key of the codes, and of the weight.
        codes: [..., rows, columns].
        block: As `scale_shapes` takes it.
        dtype: Of the weight; ``None`` for that of the scales.
        zeros: Whether there are zero points.

    Raises:
        CheckpointError: Scales or zero points are missing or do not fit.
    """
    shapes = scale_shapes(codes.shape, block)
    why = f" in blocks of {block[0]} x {block[1]}" if block else ""
    name = f"{key}_scale_inv"
    name = name if pieces.find(name) else f"{key}_scale"
    # A dtype of powers of two can be no weight's.
    kinds = FLOATS if dtype is None else (*FLOATS, "F8_E8M0")
    scales = pieces.take(name, codes, kinds, *shapes, why=why)
    tensors = [codes, scales]
    if zeros:
        points = ("I8", "F8_E4M3", *FLOATS)
        tensors.append(pieces.take(f"{key}_zero_point", codes, points, scales.shape, why=why))
    result = dtype or scales.dtype
    base = key.removesuffix(".weight")
    also = activation_keys(base)
    compute = partial(_dequantize, block, getattr(torch, TORCH_DTYPES[result]))
    pieces.replace(key, result, codes.shape, tensors, compute, *also, f"{key}_zero_point")


def _dequantize(
    block: Sequence[int] | None,
    dtype: torch.dtype,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    *outer, rows, columns = codes.shape if codes.dim() > 1 else (1, *codes.shape)

    def by_rows(values: torch.Tensor) -> torch.Tensor:
        """Float32 [all rows or 1, groups of columns]."""
        values = values.float()
        if block:
            return values.repeat_interleave(block[0], -2)[..., :rows, :].flatten(0, -2)
        if values.numel() == math.prod(outer):  # one for each of the matrices
            return values.reshape(-1, 1).repeat_interleave(rows, 0)
        return values.reshape(-1, 1)

    shifts = None if zeros is None else by_rows(zeros)
    groups = block[1] if block else columns
    return scale(codes.reshape(-1, columns), by_rows(scales), groups, dtype, shifts)
