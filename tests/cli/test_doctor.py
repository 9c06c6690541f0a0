"""``doctor``, ``shell-completion`` and several models in one ``verify``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import COMMANDS, main

pytestmark = pytest.mark.one_home


def test_the_doctor_finds_nothing(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    monkeypatch.setattr("qeff_proxy.cli.doctor._LITTLE_SPACE", 0)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "nothing is wrong" in said
    assert f"exports: 0 in {tmp_path}" in said
    assert "  onnxruntime: " in said


def test_the_doctor_names_problems(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("qeff_proxy.cli.doctor._LITTLE_SPACE", 10**18)
    assert main(["doctor", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["problems"]
    assert "cannot write" in first
    assert "are free in" in second


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_all_commands_and_options(shell: str, capsys: Any) -> None:
    assert main(["shell-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "by-layer" in script


@pytest.mark.parametrize(
    ("words", "reply"), [("ver", "verify"), ("verify --by", "--by-layer"), ("verify x", "")]
)
def test_bash_completes(words: str, reply: str, capsys: Any) -> None:
    main(["shell-completion", "bash"])
    typed = ["qeff-proxy", *words.split()]
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; "
        '_qeff_proxy; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == reply


def test_several_models_are_verified(demo_export: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["verify", str(demo_export), str(tmp_path / "none"), "--max-new-tokens", "2"]
    assert main([*command, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert [each["passed"] for each in report["models"]] == [True, False]
    assert report["passed"] is False
    (backend,) = report["models"][0]["backends"]
    assert backend["versions"]["onnxruntime"]
    assert {"torch", "transformers", "qeff-proxy"} <= set(report["models"][0]["made_by"])
    assert report["models"][0]["date"].endswith(" UTC")
    assert main([*command, "--html", "x.html"]) == 2
    assert main(["verify", str(demo_export), str(demo_export), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.endswith(f"PASSED {demo_export}\n")
