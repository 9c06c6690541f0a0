"""GPTQ: codes of 2, 4 or 8 bits, packed along the inputs.

``X.qweight`` int32 [inputs · bits / 32, outputs], ``X.scales`` and ``X.qzeros`` (packed along the
outputs) by groups of inputs, and ``X.g_idx`` [inputs], the group of each (in any order after
``desc_act``); ``X.weight`` is [outputs, inputs]. Zero points of the first format are stored less 1.
Source: GPTQModel, ``nn_modules/qlinear/__init__.py`` (``dequantize_weight``) and ``utils/model.py``
(``convert_gptq_v1_to_v2_format_module``, which adds the 1 to the packed words, as is done here).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qeff_proxy.load.quantized.arithmetic import as_bytes, group_index, packed, scale, unpack
from qeff_proxy.load.quantized.kept_codes import kept_codes
from qeff_proxy.load.quantized.pieces import FLOATS, Pieces, refusal, unsupported
from qeff_proxy.load.weight_sources import Codes, StoredWeight, Weight

_BITS = (2, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


def weights_of(held: Mapping[str, StoredWeight], settings: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a checkpoint quantized with GPTQ.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: Its layout is not known, or tensors are missing or do not fit.
    """
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits, size = settings.get("bits"), settings.get("group_size", 128)
    if layout not in _FORMATS:
        raise unsupported(f"GPTQ weights in the layout {layout!r}")
    if bits not in _BITS:
        raise unsupported(f"GPTQ weights of {bits} bits")
    if any(not str(rule).startswith("-:") for rule in settings.get("dynamic") or {}):
        raise unsupported("GPTQ weights with settings for single modules (dynamic)")
    pieces = Pieces(held)
    for name, codes in pieces.ending(".qweight"):
        if len(codes.shape) != 2 or codes.dtype != "I32":
            raise refusal(codes, f"has shape {list(codes.shape)} and dtype {codes.dtype}")
        inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
        groups = math.ceil(inputs / size) if size > 0 else 1
        why = f" with {bits} bits and groups of {size}"
        scales = pieces.take(f"{name}.scales", codes, FLOATS, (groups, outputs), why=why)
        packed = (groups, math.ceil(outputs * bits / 32))
        zeros = pieces.take(f"{name}.qzeros", codes, ("I32",), packed, why=why)
        tensors = [codes, scales, zeros]
        if f"{name}.g_idx" in held or settings.get("desc_act"):
            index = pieces.take(f"{name}.g_idx", codes, ("I32", "I64"), (inputs,), why=why)
            tensors.append(index)
        length = size if size > 0 else inputs
        compute = partial(
            _dequantize,
            *(bits, length),
            one_less=layout == "gptq",
            named=f"{name}.g_idx in {codes.path}",
        )
        kept = partial(_kept, f"{name}.weight", bits, length, tensors, one_less=layout == "gptq")
        pieces.replace(
            *(f"{name}.weight", scales.dtype, (outputs, inputs), tensors, compute), codes=kept
        )
    return pieces.weights


def _dequantize(
    bits: int,
    size: int,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    index: torch.Tensor | None = None,
    *,
    one_less: bool,
    named: str,
) -> Iterator[torch.Tensor]:
    shifts = _zeros(bits, zeros, scales, one_less=one_less)
    groups: int | torch.Tensor = size
    if index is not None and not torch.equal(index, torch.arange(len(index)) // size):
        groups = group_index(index, scales.shape[0], named)
    return scale(
        *(words.t().contiguous(), scales.t(), groups, scales.dtype, shifts),
        columns=words.shape[0] * 32 // bits,
        read=packed(bits),
    )


def _zeros(bits: int, zeros: torch.Tensor, scales: torch.Tensor, *, one_less: bool) -> torch.Tensor:
    """Zero points, uint8 [outputs, groups]."""
    if one_less:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = zeros + ones  # of int32: wraps
    return unpack(zeros, bits)[:, : scales.shape[1]].t()


def _kept(
    key: str, bits: int, size: int, tensors: Sequence[StoredWeight], *, one_less: bool
) -> Codes | None:
    inputs, outputs = tensors[0].shape[0] * 32 // bits, tensors[0].shape[1]
    if len(tensors) > 3 and not torch.equal(tensors[3].read(), torch.arange(inputs) // size):
        return None  # groups in act-order
    return kept_codes(
        *(key, bits, size, (outputs, inputs), tensors[1].dtype, tensors[:3]),
        (
            lambda words, *_: as_bytes(words.t()),
            lambda _words, scales, _: scales.t(),
            lambda _words, scales, zeros: _zeros(bits, zeros, scales, one_less=one_less),
        ),
    )
