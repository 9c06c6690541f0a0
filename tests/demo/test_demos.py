"""Demos that packages contribute: found, run, and reported when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.cli import main

pytestmark = pytest.mark.one_home

DEMOS = """
from dataclasses import replace
from pathlib import Path

import qeff_proxy
from qeff_proxy.demo.demos import Demo
from qeff_proxy.request import Request


def sane():
    return Demo(
        checkpoint=Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2",
        request=Request(prompts=("One day",)),
        given="One day",
        shown=lambda result: "it said" + result.decoded[0],
        max_new_tokens=2,
    )


def raises():
    return replace(sane(), shown=lambda result: 1 / 0)


def other():
    return "a string"
"""
ENTRIES = "".join(f"{name} = acme_demos:{name}\n" for name in ("sane", "raises", "other", "absent"))


@pytest.fixture(autouse=True)
def acme(site_packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    site_packages.install("acme", {}, {"acme_demos": DEMOS})
    site_packages.install_metadata(
        "acme-demos", f"[qeff_proxy.demos]\n{ENTRIES}gone = acme_no_module:f\n".encode()
    )


def test_demos_are_listed_and_a_package_can_be_left_out(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"name": "text", "package": "qeff-proxy"} in listed
    assert {"name": "gone", "package": "acme-demos"} in listed
    monkeypatch.setenv("QEFF_PROXY_PLUGINS", "generic")
    assert main(["demo", "--list", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["text"]


def test_one_that_fails_is_reported_and_the_others_run(capsys: Any) -> None:
    assert main(["demo", "gone", "absent", "other", "raises", "sane", "--json"]) == 10
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert not report["passed"]
    errors = {name: one["error"] for name, one in report["demos"].items() if "error" in one}
    assert set(errors) == {"gone", "absent", "other", "raises"}
    assert "No module named 'acme_no_module'" in errors["gone"]
    assert "acme-demos" in errors["absent"]
    assert "returns a str" in errors["other"]
    assert "unexpected ZeroDivisionError" in errors["raises"]
    assert len(said.err.splitlines()) == 4
    assert report["demos"]["sane"]["parity"]["passed"]
    assert report["demos"]["sane"]["text"].startswith("it said")


class NegatedLogits(OnnxRuntimeBackend):
    """ONNX Runtime, with the sign of the logits changed."""

    def open(self, *args: Any) -> Any:
        session = super().open(*args)
        run = session.run

        def negated(feeds: Any) -> Any:
            outputs = run(feeds)
            if "logits" in outputs:
                outputs["logits"] = -np.array(outputs["logits"])
            return outputs

        session.run = negated
        return session


def test_one_that_differs_from_pytorch_is_exit_code_1(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "negated", SimpleNamespace(Backend=NegatedLogits))
    monkeypatch.setitem(BUILTIN_BACKENDS, "onnxruntime", "negated:Backend")
    assert main(["demo", "sane", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)["demos"]["sane"]
    assert not report["parity"]["passed"]
    assert report["parity"]["equal_tokens"] == 0
    assert report["parity"]["steps"] == 2


def test_a_backend_that_fails_gives_its_own_exit_code(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILTIN_BACKENDS, "onnxruntime", "no_such_runtime:Backend")
    assert main(["demo", "sane"]) == 8
    assert "No module named 'no_such_runtime'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no demo 'nothing'. Known are text, "),
        (["sane", "--prompt", "x"], "--prompt is of the demo 'text'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    arguments: list[str], message: str, capsys: Any
) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_told_before_any_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "file" / "home"))
    assert main(["demo", "sane", "raises"]) == 7
    said = capsys.readouterr()
    assert said.err.count("qeff-proxy: error:") == 1
    assert str(tmp_path / "file") in said.err


def test_two_packages_with_a_demo_of_one_name(site_packages: Any, capsys: Any) -> None:
    site_packages.install_metadata("zebra", b"[qeff_proxy.demos]\ntext = zebra:text\n")
    assert main(["demo", "text"]) == 10
    assert "packages qeff-proxy and zebra both have a demo 'text'" in capsys.readouterr().err
