"""Options of the ``onnxruntime`` backend that say what weights are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OPTIONS", "VALUES", "WEIGHT_NAMES", "WeightOptions"]

#: The options that say what weights are kept in.
WEIGHT_NAMES = ("weights", "head_weights")
_BITS = {"int8": 8, "int4": 4}
_BLOCKS = (16, 32, 64, 128, 256)

OPTIONS: dict[str, str] = {
    "weights": "what matrix products keep their weights in: float (default: as exported), int8 "
    "or int4",
    "head_weights": "the same for the LM head (default: float)",
    "block_size": f"weights that share a scale: {', '.join(map(str, _BLOCKS))} (default: 32)",
    "activations": "what products with such weights are computed in: int8 (default) or float, "
    "which loses less; with int8 weights it is slow",
}
#: What each of them takes (`qeff_proxy.backends.backend.check_options`); the first, or 32, is the
#: default.
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(WEIGHT_NAMES, ("float", *_BITS)),
    "block_size": _BLOCKS,
    "activations": ("int8", "float"),
}


@dataclass(frozen=True)
class WeightOptions:
    """How the weights of one part are kept.

    Attributes:
        bits: 8 or 4; ``None``: as exported.
        block_size: Weights that share a scale.
        integer_products: Whether activations are quantized to 8 bits as they come.
    """

    bits: int | None = None
    block_size: int = 32
    integer_products: bool = True

    @classmethod
    def of(cls, part: str, options: Mapping[str, Any]) -> WeightOptions:
        """Read a part's options, each of them one of `VALUES`."""
        kind = options.get("head_weights" if part == "lm_head" else "weights", "float")
        integers = options.get("activations", "int8") == "int8"
        return cls(_BITS.get(kind), int(options.get("block_size", 32)), integers)
