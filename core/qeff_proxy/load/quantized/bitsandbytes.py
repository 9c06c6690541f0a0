"""bitsandbytes: NF4 and FP4 with scales that may be quantized themselves, and int8 rows.

4 bits: ``X`` has two codes in a byte, the first in the upper bits; ``X.quant_map`` has the value of
each code, and ``X.absmax`` the scale of each block. ``X.quant_state.bitsandbytes__nf4`` is JSON
with shape, dtype and block sizes. Scales that are codes themselves are
``X.nested_quant_map`` [code] · ``X.nested_absmax`` + an offset. 8 bits: ``X.weight`` int8 ·
``X.SCB`` / 127. Source: bitsandbytes, ``functional.py`` (``QuantState``, ``dequantize_4bit``), and
transformers, ``integrations/bitsandbytes.py`` (``dequantize_bnb_weight``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from qeff_proxy.load.quantized.arithmetic import look_up, scale
from qeff_proxy.load.quantized.pieces import FLOATS, Pieces, refusal, unsupported
from qeff_proxy.load.weight_sources import StoredWeight, Weight

_KINDS = ("nf4", "fp4")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def weights_of(
    held: Mapping[str, StoredWeight],
    settings: Mapping[str, Any],  # noqa: ARG001 (the tensors tell the layout)
) -> dict[str, Weight]:
    """The weights of a checkpoint quantized with bitsandbytes.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: A layout is not known, or tensors are missing or do not fit.
    """
    pieces = Pieces(held)
    for kind in _KINDS:
        for key, state in pieces.ending(f".quant_state.bitsandbytes__{kind}"):
            _replace_4_bits(pieces, key, state)
    for name, scales in pieces.ending(".SCB"):
        codes = pieces.take(f"{name}.weight", scales, ("I8",))
        rows = pieces.take(scales.key, codes, ("F32",), codes.shape[:1])
        layout = pieces.find(f"{name}.weight_format")
        if layout is not None and int(layout.read()):
            raise unsupported(f"int8 weights in the layout {int(layout.read())} of {layout.key}")
        pieces.replace(
            *(codes.key, "F32", codes.shape, (codes, rows), _scale_rows),
            f"{name}.weight_format",
        )
    for key, rest in pieces.weights.items():
        if isinstance(rest, StoredWeight) and (rest.dtype == "I8" or f"{key}.absmax" in held):
            raise refusal(rest, "is quantized, but the checkpoint does not hold what with")
    return pieces.weights


def _scale_rows(codes: torch.Tensor, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    return scale(codes, scales.unsqueeze(1) / 127, codes.shape[1], torch.float32)


def _replace_4_bits(pieces: Pieces, key: str, state: StoredWeight) -> None:
    try:
        about = json.loads(bytes(state.read().tolist()))
        shape = tuple(int(length) for length in about["shape"])
        size, dtype = int(about["blocksize"]), _CODES[about["dtype"]]
        outer = (int(about["nested_blocksize"]), float(about["nested_offset"]))
    except KeyError as error:
        if error.args[0] != "nested_blocksize":
            raise refusal(state, f"has no {error}, or one that is not known") from error
        outer = None
    except (ValueError, TypeError) as error:
        raise refusal(state, f"is no description of a quantized tensor ({error})") from error
    blocks = math.ceil(math.prod(shape) / size)
    length = (math.prod(shape) + 1) // 2
    codes = pieces.take(key, state, ("U8", *FLOATS))  # bnb_4bit_quant_storage
    if codes.place.length != length:
        raise refusal(codes, f"has {codes.place.length} bytes, where {list(shape)} takes {length}")
    why = f" in blocks of {size}"
    tensors = [
        codes,
        pieces.take(f"{key}.quant_map", codes, ("F32",), (16,)),
        pieces.take(f"{key}.absmax", codes, ("U8",) if outer else ("F32",), (blocks,), why=why),
    ]
    if outer:
        count = (math.ceil(blocks / outer[0]),)
        tensors.append(pieces.take(f"{key}.nested_quant_map", codes, ("F32",), (256,)))
        tensors.append(pieces.take(f"{key}.nested_absmax", codes, ("F32",), count, why=why))
    compute = partial(_dequantize, size, outer, getattr(torch, about["dtype"]))
    pieces.replace(key, dtype, shape, tensors, compute, state.key)


def _dequantize(
    size: int,
    outer: tuple[int, float] | None,
    dtype: torch.dtype,
    codes: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    *nested: torch.Tensor,
) -> Iterator[torch.Tensor]:
    if outer:
        values = nested[0].index_select(0, scales.to(torch.int32))
        scales = values * nested[1].repeat_interleave(outer[0])[: len(values)] + outer[1]
    data = codes.view(torch.uint8).flatten()
    padded = torch.nn.functional.pad(data, (0, len(scales) * size // 2 - len(data)))
    return scale(
        *(padded.view(-1, size // 2), scales.unsqueeze(1), size, dtype),
        columns=size,
        read=partial(look_up, table, low_first=False),
    )
