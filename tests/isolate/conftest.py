"""A backend with a fault, and the model that it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend

sys.path.append(str(Path(__file__).parent))  # for the faults
from operator_faults import Edit, install_fault


@pytest.fixture
def with_fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Let an edit change every graph that the onnxruntime backend opens for a layer or a group."""
    original = OnnxRuntimeBackend.open_once

    def set_fault(edit: Edit) -> None:
        monkeypatch.setattr(OnnxRuntimeBackend, "open_once", original)
        install_fault(monkeypatch, edit)

    return set_fault


@pytest.fixture(scope="module")
def checkpoint(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers, in a folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    make_model("llama", layers=6).save_pretrained(folder)
    return folder
