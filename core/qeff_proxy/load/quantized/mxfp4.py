"""MXFP4: blocks of 32 FP4 (E2M1) numbers that share a power of two, as gpt-oss stores its experts.

``X_blocks`` [experts, outputs, blocks, 16] has two codes in a byte, the first in the lower bits,
and ``X_scales`` [experts, outputs, blocks] exponents with a bias of 127; ``X`` is
[experts, inputs, outputs]. Source: transformers, ``integrations/mxfp4.py``
(``convert_moe_packed_tensors``); OCP Microscaling Formats Specification 1.0. All values are exact
in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from qeff_proxy.load.quantized.arithmetic import join, look_up, scale
from qeff_proxy.load.quantized.pieces import Pieces, refusal
from qeff_proxy.load.weight_sources import StoredWeight, Weight

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES = 16  # of a block


def weights_of(
    held: Mapping[str, StoredWeight],
    settings: Mapping[str, Any],  # noqa: ARG001 (the layout is the same in all)
) -> dict[str, Weight]:
    """The weights of a checkpoint in MXFP4.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: Scales are missing or do not fit.
    """
    pieces = Pieces(held)
    for key, blocks in pieces.ending("_blocks"):
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or blocks.dtype != "U8":
            raise refusal(
                blocks, f"has shape {list(blocks.shape)}, and not [experts, outputs, blocks, 16]"
            )
        experts, outputs, count, _ = blocks.shape
        scales = pieces.take(f"{key}_scales", blocks, ("U8",), blocks.shape[:-1])
        shape = (experts, count * _BYTES * 2, outputs)
        pieces.replace(key, "BF16", shape, (blocks, scales), _dequantize)
    return pieces.weights


def _dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    experts, outputs, count, size = blocks.shape
    for expert in range(experts):
        powers = torch.exp2(scales[expert].float() - 127)
        rows = scale(
            *(blocks[expert], powers, size * 2, torch.bfloat16),
            columns=count * size * 2,
            read=partial(look_up, table, low_first=True),
        )
        yield join(rows, (outputs, count * size * 2), torch.bfloat16).t()
