"""An interrupted verification by layer goes on at the layer where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.cli import main
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer import LayerVerification, verify_layers
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

REQUEST = Request(inputs={"input_ids": np.array([[5, 6, 7, 8, 9, 10, 11]])})
OPTIONS = VerifyOptions(max_new_tokens=3)
BEFORE = ["embedding", "body layer 0", "body layer 1", "body layer 2"]
AFTER = ["body layer 3", "body layer 4", "body layer 5", "body", "lm_head"]


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    make_model("llama", layers=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint) -> LayerVerification:
    """A run that nothing interrupted."""
    return verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)


@pytest.fixture
def stop_at(monkeypatch) -> Callable[[str, Any], list[str]]:
    """Let the backend raise at a layer; returns the layers that it opens."""
    original = OnnxRuntimeBackend.open_once

    def set_stop(where: str | None, stop: Callable[[], None] | None = None) -> list[str]:
        opened: list[str] = []

        def open_once(self: Any, export: Any, part: Any, options: Any, folder: Path) -> Any:
            taps = [spec.name for spec in part.outputs if spec.name.startswith("hidden_states")]
            opened.append(f"{part.name} layer {taps[0].split('.')[1]}" if taps else part.name)
            if opened[-1] == where and stop is not None:
                stop()
            return original(self, export, part, options, folder)

        monkeypatch.setattr(OnnxRuntimeBackend, "open_once", open_once)
        return opened

    return set_stop


def interrupt() -> None:
    raise KeyboardInterrupt


def journals(result: LayerVerification) -> list[Path]:
    return list((result.export / "io").glob("by-layer-*"))


def equal(one: LayerVerification, other: LayerVerification) -> bool:
    return one.to_json()["backends"] == other.to_json()["backends"]


def test_the_same_run_goes_on_and_has_the_same_results(checkpoint, whole, stop_at):
    stop_at("body layer 3", interrupt)
    stopped = verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)
    assert stopped.interrupted == "body layer 3"
    assert len(journals(stopped)) == 1
    opened = stop_at(None)
    resumed = verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)
    assert opened == AFTER
    assert resumed.resumed == "body layer 2"
    assert resumed.passed
    assert equal(resumed, whole)
    assert not journals(resumed)
    assert verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS).resumed is None


def test_a_killed_run_goes_on_too(checkpoint, whole, stop_at):
    process = os.fork()
    if process == 0:
        stop_at("body layer 3", lambda: os._exit(9))
        try:
            verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    opened = stop_at(None)
    assert equal(verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS), whole)
    assert opened == AFTER


@pytest.mark.parametrize("change", ["tokens", "prompt", "options", "force"])
def test_another_run_begins_anew(change, checkpoint, stop_at):
    stop_at("body layer 3", interrupt)
    verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)
    request, options = REQUEST, OPTIONS
    if change == "tokens":
        options = replace(options, max_new_tokens=2)
    elif change == "prompt":
        request = Request(inputs={"input_ids": REQUEST.inputs["input_ids"] + 1})
    elif change == "options":
        options = replace(options, backends={"onnxruntime": {"in_place": False}})
    else:
        options = replace(options, force=True)
    opened = stop_at(None)
    result = verify_layers(str(checkpoint), request=request, options=options)
    assert opened == BEFORE + AFTER
    assert result.passed
    assert not journals(result)


def test_a_damaged_file_is_one_layer_that_runs_again(checkpoint, whole, stop_at):
    stop_at("body layer 3", interrupt)
    stopped = verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS)
    (journal,) = journals(stopped)
    (journal / "body-0001.npz").write_bytes((journal / "body-0001.npz").read_bytes()[:100])
    opened = stop_at(None)
    assert equal(verify_layers(str(checkpoint), request=REQUEST, options=OPTIONS), whole)
    assert opened == ["body layer 1", *AFTER]


def test_the_command_says_so(checkpoint, stop_at, capsys):
    command = ["verify", str(checkpoint), "--by-layer", "--ids", "5,6,7,8", "--max-new-tokens", "2"]
    stop_at("body layer 4", interrupt)
    assert main(command) == 130
    said = capsys.readouterr().out
    assert "interrupted at body layer 4" in said
    assert "the same command goes on there" in said.replace("\n", " ")
    stop_at(None)
    assert main(command) == 0
    assert "up to body layer 3: the results of an interrupted run" in capsys.readouterr().out
