"""The README's commands and code do what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import qeff_proxy
from qeff_proxy.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"
HUB_ID = "openai-community/gpt2"  # stands for any model; the tests put in one that is here


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if line.startswith("qeff-proxy")
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("line", [line for line in COMMANDS if HUB_ID in line])
def test_the_commands_work(
    line: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line.replace(HUB_ID, str(CHECKPOINT)))[1:]) == 0
    assert capsys.readouterr().out


def test_two_dumps_are_compared(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (line,) = [line for line in COMMANDS if line.startswith("qeff-proxy compare")]
    monkeypatch.setenv("QEFF_HOME", str(home))
    for name in ("REFERENCE", "CANDIDATE"):
        command = ["generate", str(CHECKPOINT), "One day", "--max-new-tokens", "3"]
        assert main([*command, "--io-dir", str(tmp_path / name)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    assert (tmp_path / "report.html").is_file()
    assert "PASS" in capsys.readouterr().out.upper()


def test_the_python_code_works(tmp_path: Path, home: Path) -> None:
    (code,) = blocks("python")
    environment = {**os.environ, "QEFF_HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", code.replace(HUB_ID, str(CHECKPOINT))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "weather" in result.stdout


def test_the_text_example_works(home: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "text_model.py"), str(CHECKPOINT)],
        env={**os.environ, "QEFF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Hi there!! My name is")
    assert (Path(result.stdout.strip().rsplit(": ", 1)[1]) / "manifest.json").is_file()


def test_every_file_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_exit_codes_are_those_of_the_errors() -> None:
    from qeff_proxy import errors

    (sentence,) = re.findall(r"an exit code: (.*?); 1 is", README, flags=re.DOTALL)
    stated = {int(number) for number in re.findall(r"\d+", sentence)}
    classes = [getattr(errors, name) for name in errors.__all__]
    assert stated == {kind.exit_code for kind in classes} - {1}
