"""``qeff-proxy backends``, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.one_home

COMMAND = Path(sys.executable).with_name("qeff-proxy")
HEAVY = ("numpy", "onnx", "onnxruntime", "openvino", "torch", "transformers")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "backends", *arguments],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(done.stdout)["backends"]}


def test_it_lists_ours_and_imports_nothing() -> None:
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["checked"] is False
    found = by_name(done)
    assert list(found) == ["onnxruntime", "torch", "openvino", "qaic", "qnn"]
    assert found["openvino"]["state"] == "listed"
    assert found["openvino"]["version"]
    assert found["openvino"]["options"] is None
    assert found["qaic"]["state"] == "missing"
    assert "Cloud AI Apps SDK" in found["qaic"]["install"]


def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys, importlib_metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name == 'openvino': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from qeff_proxy.cli import main; sys.exit(main(['backends']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "openvino: the package openvino is not installed; pip install 'qeff-proxy[openvino]'"
        in done.stdout.splitlines()
    )


def test_one_is_shown_with_its_devices_and_options() -> None:
    done = run("onnxruntime", "openvino")
    assert done.returncode == 0, done.stderr
    assert "openvino finds CPU (" in done.stdout
    assert "optimization" in done.stdout
    assert "static_shapes" in done.stdout
    found = by_name(run("onnxruntime", "--json"))
    assert found["onnxruntime"]["state"] == "ok"
    assert "onnxruntime" in found["onnxruntime"]["versions"]
    assert found["onnxruntime"]["devices"]
    assert run("onnxrumtime").returncode == 2
    assert run("qaic").returncode == 8


@pytest.mark.parametrize("command", ["backends", "plugins"])
def test_it_fits_into_80_columns(command: str) -> None:
    code = (
        "import sys; sys.stdout.isatty = lambda: True\n"
        f"from qeff_proxy.cli import main; sys.exit(main(['{command}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},  # no escapes
        capture_output=True,
        text=True,
        check=True,
    )
    table = [line for line in done.stdout.splitlines() if not line.startswith("qaic: ")]
    assert max(map(len, table)) <= 80
    assert not [line for line in table if "…" in line]


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, os, sys\n"
        "from qeff_proxy.cli import main\n"
        "with contextlib.redirect_stdout(open(os.devnull, 'w')):\n"
        "    main(['backends'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
