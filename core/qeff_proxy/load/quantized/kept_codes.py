"""The codes, scales and zero points of a quantized weight, in the layout of ONNX's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from qeff_proxy.load.quantized.arithmetic import join, packed, scale, unpack
from qeff_proxy.load.weight_sources import Codes, ComputedWeight, StoredWeight

#: Columns of a group for which ONNX Runtime has kernels (``MatMulNBits``).
_SIZES = (16, 32, 64, 128, 256)
_BITS = (4, 8)
_Make = Callable[..., torch.Tensor]


def kept_codes(
    key: str,
    bits: int,
    size: int,
    shape: Sequence[int],
    dtype: str,
    tensors: Sequence[StoredWeight],
    make: tuple[_Make, _Make, _Make],
) -> Codes | None:
    """The codes of a weight, if they come in groups that ONNX Runtime has kernels for.

    Args:
        key: The weight's name.
        bits: Of a code.
        size: Columns of a group.
        shape: Of the weight: [rows, columns].
        dtype: Of the scales, and of the weight.
        tensors: What the checkpoint stores for it.
        make: Give, from the tensors, the packed codes uint8 [rows, columns · bits / 8], the scales
            [rows, groups], and the zero points uint8 [rows, groups].
    """
    rows, columns = shape
    if bits not in _BITS or size not in _SIZES or columns % size:
        return None
    words, scales, zeros = make
    groups, pieces = columns // size, tuple(tensors)
    packed = (math.ceil(rows * groups * bits / 8),)
    return Codes(
        bits,
        size,
        ComputedWeight(f"{key}.codes", "U8", (rows, columns * bits // 8), pieces, words),
        ComputedWeight(
            *(f"{key}.scales", dtype, (rows, groups), pieces),
            lambda *values: scales(*values).contiguous(),
        ),
        ComputedWeight(
            *(f"{key}.zeros", "U8", packed, pieces),
            lambda *values: pack(zeros(*values).flatten(), bits),
        ),
    )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 4 bits (uint8, along the last axis) in bytes, the first in the lower bits."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantize_kept(
    weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights of an export, in which codes with scales and zero points are replaced.

    Args:
        weights: By name; codes of ``X`` are ``X.codes``, ``X.scales`` and ``X.zeros``.
        dtype: Of the model.
    """
    result = {}
    for key, tensor in weights.items():
        name, _, ending = key.rpartition(".")
        if f"{name}.codes" not in weights or ending not in ("codes", "scales", "zeros"):
            result[key] = tensor
        elif ending == "codes":
            scales, zeros = weights[f"{name}.scales"], weights[f"{name}.zeros"]
            bits = 8 if zeros.numel() == scales.numel() else 4
            columns = tensor.shape[1] * 8 // bits
            points = unpack(zeros[None], bits).flatten()[: scales.numel()].view(scales.shape)
            size = columns // scales.shape[1]
            rows = scale(
                *(tensor, scales, size, scales.dtype, points),
                columns=columns,
                read=packed(bits),
            )
            result[name] = join(rows, (len(tensor), columns), scales.dtype).to(dtype)
    return result
