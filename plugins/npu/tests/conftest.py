"""The trained checkpoint, one export of it, and a home for what tests export."""

from __future__ import annotations

from pathlib import Path

import pytest
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``QEFF_HOME`` in which the trained checkpoint is exported once for all tests."""
    return tmp_path_factory.mktemp("shared-home")


@pytest.fixture(scope="session")
def demo_export(shared_home: Path, demo_checkpoint: Path) -> Path:
    """Its export; tests add to ``compiled`` and ``io`` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(shared_home))
        hooks = Plugins.discover().hooks_for("gpt2")
        return export_model(load_model(str(demo_checkpoint)), hooks).folder
