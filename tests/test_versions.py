"""`make test-versions`: its list is in step with what pip allows and with the page."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "version_table", ROOT / "tools" / "version_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def number(release):
    return tuple(int(part) for part in release.split("."))


def bounds(name):
    """The oldest release that pip takes, and the first that it does not."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (line,) = [
        one for one in tomllib.loads(text)["project"]["dependencies"] if one.startswith(f"{name}>=")
    ]
    oldest, _, above = line.removeprefix(f"{name}>=").partition(",<")
    return number(oldest), number(above) if above else None


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_oldest_and_the_newest_that_pip_takes_are_in_the_list(tool, name):
    releases = sorted(number(getattr(row, name)) for row in tool.VERSIONS)
    oldest, above = bounds(name)
    assert releases[0][: len(oldest)] == oldest
    assert above is None or releases[-1][:2] == (above[0], above[1] - 1)


def test_a_row_of_the_oldest_takes_the_lower_bounds_of_all(tool):
    (row,) = [row for row in tool.VERSIONS if row.oldest]
    pins = tool.pins(row)
    assert {"numpy", "onnx", "ml-dtypes", "soundfile", "pillow"} <= set(tool.oldest_releases())
    assert {name: pins[name] for name in tool.oldest_releases()} == {
        **tool.oldest_releases(),
        "torch": row.torch,
        "transformers": row.transformers,
    }


def test_the_tests_it_names_exist(tool):
    for path in tool.SUBSET:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("....\n38 passed, 300 deselected in 61.20s (0:01:01)\n", "38 passed"),
        ("F..\n1 failed, 2 passed, 3 deselected in 9.1s", "1 failed, 2 passed"),
        ("E\n1 error in 2.00s", "1 error"),
        ("no tests ran in 0.1s", "no test ran"),
        ("", "no test ran"),
    ],
)
def test_the_result_is_what_pytest_says_last(tool, printed, words):
    assert tool.closing_words(printed) == words


def test_a_release_that_cannot_be_installed_is_said_with_pips_reason(tool):
    message = (
        "ERROR: Could not find a version that satisfies the requirement torch==9 (from: 2)\n"
        "ERROR: No matching distribution found for torch==9\n"
    )
    assert tool.why_not_installed(message) == (
        "the package index has no torch==9 for this Python and system"
    )
    message = (
        "The conflict is caused by:\n"
        "    The user requested (constraint) torch<=2.14.1\n"
        "    The user requested (constraint) torch==2.15.0\n"
        "ERROR: Cannot install torch because these versions have conflicting dependencies.\n"
    )
    assert tool.why_not_installed(message) == (
        "pip's constraints disagree: torch<=2.14.1, torch==2.15.0"
    )
    assert tool.why_not_installed("") == "pip said nothing"


def test_the_table_is_written_between_the_marks(tool, tmp_path):
    page = tmp_path / "versions.md"
    shutil.copy(tool.PAGE, page)
    row = tool.VERSIONS[0]
    results = [
        tool.Result(row, "38 passed", True, {"torch": f"{row.torch}+cpu", "onnx": "1.21.0"}),
        tool.Result(row, "not installed: no network", passed=False),
    ]
    for _ in range(2):  # it replaces the table that it wrote before
        tool.write_table(page, tool.table_of(results))
    text = page.read_text("utf-8")
    assert text.count(f"| {row.torch} | {row.transformers} | 1.21.0 |") == 1
    assert text.count("not installed: no network") == 1
    before = tool.PAGE.read_text("utf-8").partition(tool.START)[0]
    assert text.startswith(before)


def test_the_page_has_the_list(tool):
    table = tool.PAGE.read_text("utf-8").split(tool.START)[1].split(tool.END)[0]
    for row in tool.VERSIONS:
        assert f"| {row.torch} | {row.transformers} |" in table
