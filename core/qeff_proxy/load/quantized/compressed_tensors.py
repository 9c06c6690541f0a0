"""The formats of compressed-tensors: packed integers, int8 and FP8.

``pack-quantized``: ``X.weight_packed`` int32 [outputs, inputs · bits / 32], ``X.weight_shape``, and
zero points packed along the outputs; codes are stored plus half their range. ``int-quantized``,
``float-quantized`` and ``naive-quantized``: ``X.weight`` of int8 or FP8. All have
``X.weight_scale``, whose dtype the weight gets. Source: compressed-tensors,
``compressors/pack_quantized``, ``compressors/naive_quantized`` and
``quantization/lifecycle/forward_helpers.py`` (``_dequantize``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qeff_proxy.load.quantized.arithmetic import group_index, packed, scale, unpack
from qeff_proxy.load.quantized.kept_codes import kept_codes
from qeff_proxy.load.quantized.pieces import FLOATS, FP8, Pieces, refusal, unsupported
from qeff_proxy.load.quantized.scaled_codes import activation_keys, replace_scaled, scale_shapes
from qeff_proxy.load.weight_sources import Codes, StoredWeight, Weight

_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mixed-precision", "dense"),
)
_BITS = (2, 4, 8)


def weights_of(held: Mapping[str, StoredWeight], settings: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a checkpoint that compressed-tensors wrote.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: A format is not known, or tensors are missing or do not fit.
    """
    groups = list((settings.get("config_groups") or {}).values())
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    for layout in (settings.get("format"), sparsity, *(group.get("format") for group in groups)):
        if layout is not None and layout not in _FORMATS:
            raise unsupported(f"weights in compressed-tensors' format {layout!r}")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise unsupported("weights that were rotated (transform_config of compressed-tensors)")
    schemes = [group["weights"] for group in groups if group.get("weights")]
    pieces = Pieces(held)
    for key, codes in held.items():
        if key.endswith(".weight_packed"):
            _replace_packed(pieces, key.removesuffix("_packed"), codes, schemes)
        elif codes.dtype in (*FP8, "I8") and key.endswith("weight"):
            scheme = _scheme_of(pieces, key, codes, codes.shape, schemes)
            asymmetric = not scheme.get("symmetric", True) or f"{key}_zero_point" in held
            zeros = codes.dtype == "I8" and asymmetric
            replace_scaled(pieces, key, codes, _block(scheme), zeros=zeros)
    return pieces.weights


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; ``None`` for one a tensor or row."""
    if scheme.get("strategy") == "block":
        height, width = scheme["block_structure"]
        return int(height), int(width)
    size = scheme.get("group_size")
    return (1, int(size)) if size and size > 0 else None


def _scheme_of(
    pieces: Pieces,
    key: str,
    codes: StoredWeight,
    shape: Sequence[int],
    schemes: Sequence[Mapping[str, Any]],
) -> Mapping[str, Any]:
    """The settings that a weight was quantized with: those whose scales have its scales' shape."""
    scales = pieces.take(f"{key}_scale", codes, FLOATS)
    shapes = [each for scheme in schemes for each in scale_shapes(shape, _block(scheme))]
    for scheme in schemes:
        if scales.shape in scale_shapes(shape, _block(scheme)):
            return scheme
    pieces.take(f"{key}_scale", codes, FLOATS, *shapes, why=" by its quantization_config")
    raise refusal(codes, "is quantized, where quantization_config has no settings for weights")


def _replace_packed(
    pieces: Pieces, key: str, codes: StoredWeight, schemes: Sequence[Mapping[str, Any]]
) -> None:
    size = pieces.take(f"{key}_shape", codes, ("I64", "I32"), (2,))
    rows, columns = (int(length) for length in size.read())
    fitting = [
        scheme
        for scheme in schemes
        if codes.shape == (rows, math.ceil(columns * scheme.get("num_bits", 0) / 32))
    ]
    if codes.dtype != "I32" or not fitting:
        raise refusal(
            codes,
            f"has shape {list(codes.shape)}, where no settings of quantization_config pack a "
            f"weight of shape {[rows, columns]} so",
        )
    scheme = _scheme_of(pieces, key, codes, (rows, columns), fitting)
    bits, block = int(scheme["num_bits"]), _block(scheme)
    if bits not in _BITS or (block and block[0] > 1):
        raise unsupported(f"weights packed with {scheme.get('strategy')} scales and {bits} bits")
    scales = pieces.take(f"{key}_scale", codes, FLOATS)
    tensors = [codes, scales]
    points = pieces.find(f"{key}_zero_point")  # schemes may differ in nothing else
    asymmetric = not scheme.get("symmetric", True) or (points is not None and points.dtype == "I32")
    if asymmetric and scales.shape[:1] == (rows,):
        packed = (math.ceil(rows * bits / 32), math.prod(scales.shape) // rows)
        tensors.append(pieces.take(f"{key}_zero_point", codes, ("I32",), packed))
    elif asymmetric:
        tensors.append(pieces.take(f"{key}_zero_point", codes, ("I8",), scales.shape))
    # Without its groups, a weight in act-order would be scaled wrongly.
    indexed = f"{key}_g_idx" in pieces.weights or scheme.get("actorder") in ("group", True)
    if indexed:
        tensors.append(pieces.take(f"{key}_g_idx", codes, ("I32", "I64"), (columns,)))
    compute = partial(
        _dequantize,
        *(bits, columns, block[1] if block else columns, f"{key}_g_idx in {codes.path}"),
        asymmetric=asymmetric,
        indexed=indexed,
    )
    base = key.removesuffix(".weight")
    also = (f"{key}_shape", f"{key}_zero_point", *activation_keys(base))
    kept = None
    if not indexed and block and scales.shape == (rows, columns // block[1]):
        kept = partial(_kept, key, bits, block[1], (rows, columns), tensors)
    pieces.replace(key, scales.dtype, (rows, columns), tensors, compute, *also, codes=kept)


def _dequantize(
    bits: int,
    columns: int,
    size: int,
    named: str,
    words: torch.Tensor,
    scales: torch.Tensor,
    *rest: torch.Tensor,
    asymmetric: bool,
    indexed: bool,
) -> Iterator[torch.Tensor]:
    half = 1 << (bits - 1)
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    zeros: torch.Tensor | int = half
    if asymmetric and rest[0].dtype == torch.int32:
        zeros = unpack(rest[0].t(), bits)[:, : scales.shape[0]].t()
    elif asymmetric:
        zeros = rest[0].reshape(-1, 1).float() + half
    groups: int | torch.Tensor = size
    if indexed and not bool((rest[-1] == -1).any()):  # -1: columns in their order
        groups = group_index(rest[-1], scales.shape[1], named)
    return scale(
        *(words, scales, groups, scales.dtype, zeros),
        columns=columns,
        read=packed(bits),
    )


def _kept(
    key: str, bits: int, size: int, shape: tuple[int, int], tensors: Sequence[StoredWeight]
) -> Codes | None:
    def zeros(_: torch.Tensor, scales: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        if not packed:
            return torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
        return unpack(packed[0].t(), bits)[:, : shape[0]].t()

    length = shape[1] * bits // 8
    return kept_codes(
        *(key, bits, size, shape, tensors[1].dtype, tensors),
        (
            lambda words, *_: words.contiguous().view(torch.uint8)[:, :length],
            lambda _words, scales, *_: scales,
            zeros,
        ),
    )
