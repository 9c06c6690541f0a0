"""Demos that packages contribute: found, run, and reported when they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main

DEMOS = """
from dataclasses import replace
from pathlib import Path

import qeff_proxy
from qeff_proxy.demo.demos import Demo
from qeff_proxy.demo.parity import parity_of_dump
from qeff_proxy.request import Request


def sane():
    return Demo(
        checkpoint=Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2",
        request=Request(prompts=("One day",)),
        given="One day",
        parity=parity_of_dump,
        shown=lambda result: "it said" + result.decoded[0],
        settings={"max_new_tokens": 2, "do_sample": False},
    )


def differs():
    return replace(sane(), parity=lambda *given: replace(parity_of_dump(*given), equal_tokens=0))


def raises():
    return replace(sane(), parity=lambda *given: 1 / 0)


def other():
    return "a string"
"""
ENTRIES = "".join(
    f"{name} = acme_demos:{name}\n" for name in ("sane", "differs", "raises", "other", "absent")
)


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
    assert main(["demo", "gone", "absent", "other", "differs", "raises", "sane", "--json"]) == 10
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
    assert not report["demos"]["differs"]["parity"]["passed"]
    assert main(["demo", "differs"]) == 1


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


def test_two_packages_with_a_demo_of_one_name(site_packages: Any, capsys: Any) -> None:
    site_packages.install_metadata("zebra", b"[qeff_proxy.demos]\ntext = zebra:text\n")
    assert main(["demo", "text"]) == 10
    assert "packages qeff-proxy and zebra both have a demo 'text'" in capsys.readouterr().err
