"""A disk or an output that takes nothing, or ASCII alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main

PROGRAM = [sys.executable, "-m", "qeff_proxy"]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_full_disk(limit: int, saved_gpt2: Path, tmp_path: Path, capfd: Any) -> None:
    """A limit on file sizes stands for a full disk: the system refuses to write on."""
    target = tmp_path / "out"
    child = os.fork()  # a limit cannot be lifted again, and the libraries are loaded here
    if child == 0:
        code = -1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(["export", str(saved_gpt2), "--output", str(target)])
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    said = capfd.readouterr().err
    assert os.waitstatus_to_exitcode(status) == 7, said
    assert "cannot write" in said
    assert said.count("\n") == 1
    assert not target.exists()
    assert not list(tmp_path.glob(".out.partial-*"))


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        ("> /dev/full", 1, "cannot write to standard output: No space left on device"),
        (">&-", 1, "standard output is closed"),
        ("1< /dev/null", 1, "cannot write to standard output: Bad file descriptor"),
        ("| true", 141, ""),
    ],
)
def test_an_output_that_takes_nothing(redirection: str, code: int, words: str) -> None:
    script = f'set -o pipefail; {{ sleep 0.5; "$@"; }} {redirection}'
    command = ["bash", "-c", script, "bash", *PROGRAM, "plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == bool(words)


def test_an_output_of_ascii(demo_export: Path, forked: Callable[..., Any]) -> None:
    command = ["generate", str(demo_export), "Anna é", "--max-new-tokens", "2"]
    for option in ([], ["--json"]):
        done = forked(main, [*command, *option], encoding="ascii")
        assert done.returncode == 0, done.stderr
        assert "Anna" in done.stdout
    assert json.loads(done.stdout)["inputs"] == ["Anna é"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "{checkpoint}"),
        ("verify", "{checkpoint}"),
        ("verify", "{checkpoint}", "--by-layer"),
        ("generate", "{checkpoint}", "5,6", "--ids"),
    ],
)
@pytest.mark.parametrize("home", ["a folder below a file", "a read-only folder"])
def test_a_home_that_cannot_be_written_is_named_before_the_work_begins(
    arguments: tuple[str, ...],
    home: str,
    saved_gpt2: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "home" if "below" in home else tmp_path / "home"
    monkeypatch.setenv("QEFF_HOME", str(folder))
    if "below" not in home:  # tests may run as root, whom no mode of a folder stops
        monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    # `verify` first: imported after `options` was changed, it would keep the changed function.
    for load in ("qeff_proxy.cli.verify.loaded_of", "qeff_proxy.cli.options.loaded_of"):
        monkeypatch.setattr(load, lambda *_arguments, **_options: pytest.fail("the work began"))
    assert main([word.format(checkpoint=saved_gpt2) for word in arguments]) == 7
    said = capsys.readouterr().err
    assert said.startswith(f"qeff-proxy: error: cannot write {folder}: ")
    assert said.count("\n") == 1


def test_an_export_in_a_home_that_cannot_be_written_is_used(
    saved_gpt2: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(saved_gpt2)]) == 0
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert main(["export", str(saved_gpt2)]) == 0
    capsys.readouterr()


def test_a_dump_that_cannot_be_written_is_named_before_the_work_begins(
    demo_export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    command = ["generate", str(demo_export), "5,6", "--ids", "--max-new-tokens", "1"]
    assert main(command) == 0
    assert main([*command, "--write-io"]) == 7
    assert f"cannot write {demo_export}: " in capsys.readouterr().err
