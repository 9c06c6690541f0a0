"""``qeff-proxy doctor``: what a report of a problem needs, and the usual traps."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.export_folder import cache_home
from qeff_proxy.artifact.manifest_schema import MANIFEST
from qeff_proxy.backends.registry import list_backends
from qeff_proxy.cli.output import add_json_option, format_bytes, print_json, print_text
from qeff_proxy.common.file_errors import check_writable
from qeff_proxy.errors import ProxyError
from qeff_proxy.plugins.manager import Plugins

#: Packages whose versions matter, besides those of this program.
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy", "safetensors")
#: Free bytes below which an export of a model of a usual size fails.
_LITTLE_SPACE = 10_000_000_000


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "Exit status: 0 when nothing is wrong, else 1. Nothing is imported or changed."
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is found, and return 1 when something is wrong."""
    facts, problems = _facts(), _problems()
    if args.json:
        print_json({**facts, "problems": problems})
        return int(bool(problems))
    for name, value in facts.items():
        if isinstance(value, dict):
            print_text(f"{name}:")
            for inner, text in value.items():
                print_text(f"  {inner}: {text}")
        else:
            print_text(f"{name}: {value}")
    for problem in problems:
        print_text(f"PROBLEM: {problem}")
    if not problems:
        print_text("nothing is wrong")
    return int(bool(problems))


def _facts() -> dict[str, Any]:
    installed = {dist.name: dist.version for dist in distributions() if dist.name}
    ours = sorted(name for name in installed if name.startswith("qeff-proxy"))
    home = cache_home()
    exports = [path for path in home.glob("*") if (path / MANIFEST).is_file()]
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    names = (*ours, *(name for name in _PACKAGES if name in installed))
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: installed[name] for name in names},
        "backends": {
            report.name: f"{report.state}{f': {report.reason}' if report.reason else ''}"
            for report in list_backends()
        },
        "exports": f"{len(exports)} in {home}, {format_bytes(size)}",
        "free disk": format_bytes(_free(home)),
        "memory": format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "cpus": len(os.sched_getaffinity(0)),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("QEFF_", "OMP_")) or name in {"HF_HOME", "HF_HUB_OFFLINE"}
        },
    }


def _free(folder: Path) -> int:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free


def _problems() -> list[str]:
    """What is likely to fail, each with what to do about it."""
    problems = []
    home = cache_home()
    try:
        check_writable(home)
    except ProxyError as error:
        problems.append(str(error))
    if _free(home) < _LITTLE_SPACE:
        problems.append(
            f"{format_bytes(_free(home))} are free in {home}: set QEFF_HOME to another disk, or "
            "remove exports"
        )
    with contextlib.redirect_stdout(sys.stderr):  # a plugin may print
        reports = Plugins.discover().reports()
    problems += [
        f"plugin {report.plugin} of {report.distribution}: {report.reason}"
        for report in reports
        if report.state in {"failed", "rival"}
    ]
    if not reports:
        problems.append("no plugin is installed: pip install 'qeff-proxy[text]'")
    problems += [
        f"backend {report.name}: {report.reason}"
        for report in list_backends()
        if report.state in {"failed", "rival"}
    ]
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        problems.append("standard output is not UTF-8: set PYTHONIOENCODING=utf-8")
    return problems
