"""Help and the list of plugins are instant: nothing heavy is imported for them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("qeff-proxy")
LIBRARIES = (
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "qeff_proxy_text",
    "safetensors",
    "torch",
    "transformers",
)


def cpu_seconds(command: list[str | Path], attempts: int = 5) -> float:
    """CPU seconds of a command, the least of several attempts."""
    spent = []
    for _ in range(attempts):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["--help"], 12), (["plugins", "--help"], 12), (["plugins"], 24), (["backends"], 24)],
    ids=["help", "help of plugins", "plugins", "backends"],
)
def test_it_answers_at_once(arguments, limit):
    """Within so many starts of a bare interpreter: seconds of a loaded machine say little."""
    bare = cpu_seconds([sys.executable, "-c", "pass"])
    assert cpu_seconds([COMMAND, *arguments]) < limit * bare


def test_the_clock_would_see_a_heavy_import():
    bare = cpu_seconds([sys.executable, "-c", "pass"])
    assert cpu_seconds([sys.executable, "-c", "import torch"], attempts=1) > 24 * bare


def imported_by(statement: str) -> set[str]:
    """Which of the heavy libraries ``statement`` imports."""
    code = (
        f"import contextlib, json, os, sys\n"
        f"with contextlib.redirect_stdout(open(os.devnull, 'w')):\n    {statement}\n"
        "print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *LIBRARIES], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import qeff_proxy",
        "import qeff_proxy.cli",
        "import qeff_proxy.hookspecs",
        "import qeff_proxy.plugins",
        "import qeff_proxy.cli as cli; cli.main(['plugins'])",
        "import qeff_proxy.cli as cli; cli.main(['plugins', '--json'])",
    ],
)
def test_nothing_heavy_is_imported(statement):
    assert imported_by(statement) == set()


@pytest.mark.parametrize("stage", ["load", "export", "backends", "run", "compare", "auto"])
def test_the_public_function_of_a_stage_is_light(stage):
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"}
    assert imported_by(f"import qeff_proxy.{stage}") & heavy == set()


def test_a_heavy_import_would_be_seen():
    assert "torch" in imported_by("import qeff_proxy.families.generic")
