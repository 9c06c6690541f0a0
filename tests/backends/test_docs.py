"""The commands and the code of docs/backends.md do what it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.backends.registry import list_backends
from qeff_proxy.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_work(line: str, demo_export: Path, capsys: Any) -> None:
    assert main(shlex.split(line.replace("MODEL", str(demo_export)))[1:]) == 0
    assert capsys.readouterr().out


def test_the_python_code_works(
    demo_checkpoint: Path,
    demo_export: Path,
    shared_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    forked: Callable[..., Any],
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(shared_home))  # where it is exported already
    code = blocks("python")[0].replace('"MODEL"', repr(str(demo_checkpoint)))
    done = forked(exec, code, {"__name__": "__main__"})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[\[\d+ +\d+ +\d+ +\d+\]\]", done.stdout.strip())


def test_the_backend_of_the_page_passes_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., Any]
) -> None:
    _, backend, suite = blocks("python")
    (tmp_path / "test_page.py").write_text(f"{backend}\n\n{suite}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    done = forked(pytest.main, options)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed", done.stdout, flags=re.MULTILINE)


def test_the_command_line_of_qaic_is_the_golden_one() -> None:
    import json

    golden = ROOT / "plugins" / "npu" / "tests" / "qaic" / "golden" / "command.json"
    (shown,) = [block for block in blocks("text") if block.startswith("qaic-compile")]
    assert shown.split() == json.loads(golden.read_text(encoding="utf-8"))


def test_every_backend_and_option_of_openvino_is_there() -> None:
    from qeff_proxy_npu.openvino.backend import OpenVinoBackend

    assert [one.name for one in list_backends() if f"| `{one.name}` |" not in PAGE] == []
    assert [name for name in OpenVinoBackend.options if f"| `{name}` |" not in PAGE] == []
