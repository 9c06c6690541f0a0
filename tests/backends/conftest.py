"""A home for what the tests export, and the checkpoint that comes with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import qeff_proxy


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `QEFF_HOME` of the test's own."""
    path = tmp_path / "home"
    monkeypatch.setenv("QEFF_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained checkpoint that comes with the program."""
    return Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"
