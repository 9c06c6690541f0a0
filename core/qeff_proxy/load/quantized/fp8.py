"""FP8 weights (E4M3 or E5M2) with a scale per tensor, output channel, or block.

``X.weight`` is ``X.weight`` · ``X.weight_scale_inv`` (``fp8``, as DeepSeek-V3 publishes it: ``inv``
is in the name only) or · ``X.weight_scale`` (``fbgemm_fp8``), in float32. Source: transformers,
``integrations/finegrained_fp8.py`` (``Fp8Dequantize``) and ``integrations/fbgemm_fp8.py``; smaller
blocks at the edges as in DeepSeek-V3's ``inference/kernel.py`` (``weight_dequant``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_proxy.load.quantized.pieces import FP8, Pieces
from qeff_proxy.load.quantized.scaled_codes import replace_scaled
from qeff_proxy.load.weight_sources import StoredWeight, Weight


def weights_of(held: Mapping[str, StoredWeight], settings: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a checkpoint in FP8.

    Args:
        held: What it holds, by key.
        settings: Its ``quantization_config``.

    Raises:
        CheckpointError: Scales are missing or do not fit.
    """
    pieces = Pieces(held)
    for key, codes in held.items():
        if codes.dtype in FP8:
            replace_scaled(pieces, key, codes, settings.get("weight_block_size"), "F32")
    return pieces.weights
