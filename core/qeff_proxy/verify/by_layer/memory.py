"""Whether a model can be verified whole in this machine's memory."""

from __future__ import annotations

import math

from qeff_proxy.common.free_memory import free_memory
from qeff_proxy.load.load_model import LoadedModel

#: Peak memory of a verification over the float32 weights (docs/performance.md).
_PEAK = 2.2


def memory_lacking(loaded: LoadedModel) -> str | None:
    """Why a model that can be read layer by layer should be verified so; ``None`` if it fits."""
    if loaded.sample is None or loaded.is_read:
        return None
    elements = sum(math.prod(weight.shape) for weight in loaded.weights.values())
    needed, free = elements * 4 * _PEAK, free_memory()
    if free is None or needed <= free:
        return None
    return (
        f"verifying {loaded.source} whole takes about {needed / 1e9:.1f} GB of memory, and "
        f"{free / 1e9:.1f} GB are free"
    )
