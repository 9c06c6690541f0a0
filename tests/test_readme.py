"""The README's links, exit codes and example; `tests/docs` runs its commands and code."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qeff_proxy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"


def test_the_text_example_works(forked: Callable[..., Any]) -> None:
    def run() -> None:
        sys.argv = ["text_model.py", str(CHECKPOINT)]
        runpy.run_path(str(ROOT / "examples" / "text_model.py"), run_name="__main__")

    result = forked(run)
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
