"""Whether a model can be verified whole in this machine's memory."""

from __future__ import annotations

import math
from pathlib import Path

from qeff_proxy.load.load_model import LoadedModel

#: Peak memory of a verification over the float32 weights (docs/performance.md).
_PEAK = 2.2
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY = Path("/proc/meminfo")


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


def free_memory() -> int | None:
    """Bytes that this process can still use; ``None`` where the system does not say."""
    if not _MEMORY.is_file():
        return None
    lines = (line.partition(":") for line in _MEMORY.read_text().splitlines())
    available = next(value for name, _, value in lines if name == "MemAvailable")
    free = int(available.split()[0]) * 1024
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return free if limit == "max" else min(free, int(limit))
