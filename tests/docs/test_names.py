"""Every dotted name of ours in the documentation, docstrings and comments exists."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
SOURCES = [
    path
    for folder in (ROOT / "core", *(ROOT / "plugins").glob("*/qeff_proxy_*"), ROOT / "examples")
    for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.tmpl")))
]
#: In backquotes, one or two, or after mkdocstrings' colons; a call's parentheses may follow.
NAME = re.compile(r"(?:`|^::: )(qeff_proxy(?:_\w+)?(?:\.\w+)+)(?:\([^`]*\))?(?:`|$)", re.MULTILINE)
#: Groups of entry points, which need not be modules.
GROUPS = {
    "qeff_proxy.backend_listings",
    "qeff_proxy.demos",
    "qeff_proxy.device_targets",
    "qeff_proxy.executors",
    "qeff_proxy.remote_code",
}


def unknown_names(text: str) -> list[str]:
    """The names in ``text`` that are neither a module nor an attribute of one."""
    unknown = []
    for name in dict.fromkeys(NAME.findall(text)):
        if name not in GROUPS:
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                unknown.append(name)
    return unknown


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_names_exist(paths):
    assert len(paths) > 10
    unknown = {path: unknown_names(path.read_text(encoding="utf-8")) for path in paths}
    assert {
        path.relative_to(ROOT).as_posix(): names for path, names in unknown.items() if names
    } == {}


@pytest.mark.parametrize("form", ["`{}`", "``{}``", "see `{}(model)`", "::: {}\n"])
def test_an_unknown_name_is_reported(form):
    text = form.format("qeff_proxy.cut.no_such_name")
    assert unknown_names(text) == ["qeff_proxy.cut.no_such_name"]
    assert unknown_names(form.format("qeff_proxy.cut.cut_model")) == []
