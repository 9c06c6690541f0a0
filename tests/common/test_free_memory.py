"""The memory that is free, as the system and its control group say."""

from __future__ import annotations

from pathlib import Path

import pytest
from qeff_proxy.common import free_memory


def test_free_memory_is_the_least_of_the_machine_and_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "_MEMORY", tmp_path / "meminfo")
    assert free_memory.free_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    3000 kB\n")
    monkeypatch.setattr(free_memory, "_LIMIT", tmp_path / "memory.max")
    assert free_memory.free_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.free_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("1048576\n")
    assert free_memory.free_memory() == 1048576
