"""How much memory this process can still use."""

from __future__ import annotations

from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY = Path("/proc/meminfo")


def free_memory() -> int | None:
    """Bytes that this process can still use; ``None`` where the system does not say."""
    if not _MEMORY.is_file():
        return None
    lines = (line.partition(":") for line in _MEMORY.read_text().splitlines())
    available = next(value for name, _, value in lines if name == "MemAvailable")
    free = int(available.split()[0]) * 1024
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return free if limit == "max" else min(free, int(limit))
