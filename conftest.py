"""Fixtures for the tests of the core and of all plugin packages."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `QEFF_HOME` for the tests of one module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `QEFF_HOME` of the test's own; with the mark `one_home`, its module's.

    Tests of what comes after the export share a home, so that each model is exported once.
    """
    shared = request.node.get_closest_marker("one_home") is not None
    path: Path = request.getfixturevalue("module_home") if shared else tmp_path / "home"
    monkeypatch.setenv("QEFF_HOME", str(path))
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite runs two tests at a time on machines of two cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained checkpoint that comes with the program."""
    import qeff_proxy

    return Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"


@dataclass(frozen=True)
class Finished:
    """What is left of a process."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(function: Callable[..., Any], *arguments: Any, encoding: str = "utf-8") -> Finished:
    """Call a function in a copy of this process, as a program of its own.

    A new process would take many seconds to load the libraries that are loaded here.

    Args:
        function: Returns the exit code; ``None`` is 0.
        arguments: Its arguments.
        encoding: Of the copy's standard output.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
            child = os.fork()
        if child == 0:
            code: Any = 70
            try:
                for number, file in enumerate((stdout, stderr), 1):
                    os.dup2(file.fileno(), number)
                sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
                sys.stderr = os.fdopen(2, "w", encoding=encoding, closefd=False)
                code = function(*arguments) or 0
            except SystemExit as exit_:
                code = exit_.code or 0
            except BaseException:  # noqa: BLE001 (the copy must end here)
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return Finished(os.waitstatus_to_exitcode(status), *texts)


@pytest.fixture(scope="session")
def forked() -> Callable[..., Finished]:
    """`run_forked` as a fixture."""
    return run_forked
