"""Options of the ``onnxruntime`` backend that say what weights are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OPTIONS", "WEIGHT_NAMES", "WeightOptions"]

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
        """Read a part's options.

        Raises:
            UsageError: One of them is none of its values.
        """
        kinds = {name: _choice(options, name, "float", *_BITS) for name in WEIGHT_NAMES}
        activations = _choice(options, "activations", "int8", "float")
        block_size = options.get("block_size", 32)
        if block_size not in _BLOCKS or isinstance(block_size, bool):
            raise UsageError(
                f"block_size is {block_size!r}",
                f"Choose one of {', '.join(map(str, _BLOCKS))}.",
            )
        kind = kinds["head_weights" if part == "lm_head" else "weights"]
        return cls(_BITS.get(kind), int(block_size), activations == "int8")


def _choice(options: Mapping[str, Any], name: str, *values: str) -> str:
    value = str(options.get(name, values[0])).lower()
    if value not in values:
        raise UsageError(
            f"{name} is {options[name]!r}",
            f"Choose one of {', '.join(values)}.",
        )
    return value
