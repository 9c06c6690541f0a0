"""In a notebook, exports and compilations show their stages in the cell."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy import QEFFAutoModelForCausalLM


class Handle:
    """What IPython's ``display`` returns; keeps what it was told to show."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.said.append(data["text/plain"])


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """Those of a stand-in for IPython in a kernel."""
    made: list[Handle] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        made.append(Handle())
        made[-1].update(data, raw=True)
        return made[-1]

    modules: dict[str, Any] = {name: types.ModuleType(name) for name in ("IPython", "_display")}
    modules["IPython"].get_ipython = lambda: types.SimpleNamespace(kernel=object())
    modules["_display"].display = display
    monkeypatch.setitem(sys.modules, "IPython", modules["IPython"])
    monkeypatch.setitem(sys.modules, "IPython.display", modules["_display"])
    return made


def test_the_stages_of_a_cold_export(
    handles: list[Handle], make_model: Any, tmp_path: Path
) -> None:
    model = QEFFAutoModelForCausalLM(make_model("gpt2"), enable_proxy=True)
    model.export(tmp_path / "export")
    model.compile()
    exporting, compiling = handles
    assert any("tracing body" in said for said in exporting.said)
    assert any("compiling body" in said for said in compiling.said)
    assert exporting.said[-1].startswith("exporting: ended (")


def test_the_stages_of_verifying(handles: list[Handle], saved_gpt2: Path) -> None:
    from qeff_proxy.verify.options import VerifyOptions
    from qeff_proxy.verify.verify_model import verify_model

    options = VerifyOptions(max_new_tokens=1)
    assert verify_model(saved_gpt2, ["torch"], options=options).passed
    (verifying,) = handles
    assert any("running torch" in said for said in verifying.said)
    stages: list[str] = []
    assert verify_model(saved_gpt2, ["torch"], options=options, progress=stages.append).passed
    assert len(handles) == 1
    assert "running torch" in stages


def test_loading_says_nothing_of_widgets_that_are_not_installed(saved_gpt2: Path) -> None:
    """In a new process, where IPython is loaded, and ipywidgets are not found."""
    program = f"""
import sys, types
sys.modules["ipywidgets"] = None
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = object
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
from qeff_proxy.load.load_model import load_model
load_model({str(saved_gpt2)!r})
assert "tqdm.notebook" in sys.modules, "tqdm did not take it for a notebook"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
