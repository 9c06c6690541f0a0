"""How far a variant's last outputs are from those of the model in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array, to_array
from qeff_proxy.compare.tally import Tally
from qeff_proxy.tensor_names import LAYER_NAME

#: The output that gives a distribution of tokens.
LOGITS = "logits"


@dataclass(frozen=True)
class Distance:
    """How far outputs are from the reference's.

    Attributes:
        sqnr: Signal-to-quantization-noise ratio in dB, over all positions.
        kl: Mean divergence of the distributions, in nats; ``None`` of outputs that are no logits.
        top1: Share of positions with the same first token; likewise.
        positions: How many there are.
    """

    sqnr: float
    kl: float | None = None
    top1: float | None = None
    positions: int = 0

    @property
    def noise(self) -> float:
        """The noise's power over the signal's."""
        return float(10 ** (-self.sqnr / 10))


def distance_of(
    expected: Sequence[Mapping[str, Array]],
    actual: Sequence[Mapping[str, Array]],
    tensors: Mapping[str, Any],
) -> Distance:
    """Compare the last outputs of all calls.

    Args:
        expected: The reference's outputs, by name.
        actual: The variant's.
        tensors: Of the input; positions that its ``attention_mask`` pads are not compared.
    """
    signal = noise = 0.0
    tally, positions = Tally(keep=0), 0
    seen = tensors.get("attention_mask")
    mask = None if seen is None else to_array(seen).astype(bool)
    for one, other in zip(expected, actual, strict=True):
        for name, reference in one.items():
            if LAYER_NAME.fullmatch(name) or reference.dtype.kind in "biu":
                continue
            candidate = other[name]
            if mask is not None and reference.ndim > 2 and reference.shape[:2] == mask.shape:
                reference, candidate = reference[mask], candidate[mask]
            signal += float(np.square(reference, dtype=np.float64).sum())
            noise += float(np.square(reference - candidate, dtype=np.float64).sum())
            if name == LOGITS and np.isfinite(candidate).all():
                rows = reference.reshape(-1, reference.shape[-1])
                tokens = np.concatenate([[0], rows.argmax(1)])
                tally.add(rows, candidate.reshape(rows.shape), tokens, 1)
                positions += len(rows)
    sqnr = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
    sqnr = sqnr if not math.isnan(noise) else -math.inf
    if not tally.windows:
        return Distance(sqnr)
    measures = tally.measures()
    return Distance(sqnr, measures["kl"], measures["top1"], positions)
