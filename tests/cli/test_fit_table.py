"""Tables of real commands at several widths: no figure is cut, no name is broken within a word."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import fit_table, main
from rich.console import Console
from rich.table import Table

pytestmark = pytest.mark.one_home

COMMANDS = [
    ["verify", "{model}", "--backend", "onnxruntime", "--backend", "openvino", "--speed"],
    ["verify", "{model}", "--by-layer"],
    ["verify", "{model}", "--self"],
    ["compare", "{dumps}/a", "{dumps}/b", "--all"],
    ["sensitivity", "{model}", "--backend", "qnn", "--precision", "fp16"],
    ["inspect", "{model}"],
    ["plugins"],
    ["backends", "onnxruntime"],
]


def printed(table: Table, width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
    for piece in fit_table.fit_table(table, console):
        console.print(piece)
    return stream.getvalue()


def words(text: str) -> set[str]:
    return set(re.sub(r"[│┃─━┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇┳]", " ", text).split())


@pytest.fixture(scope="module")
def dumps(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dumps")
    for name, backend in (("a", "onnxruntime"), ("b", "openvino")):
        where = ["--io-dir", str(folder / name), "--backend", backend]
        assert main(["generate", str(demo_export), "One", "--max-new-tokens", "2", *where]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_words_and_figures_are_whole_at_any_width(
    command: list[str],
    saved_gpt2: Path,
    dumps: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables: list[Table] = []
    fit = fit_table.fit_table

    def seen(table: Table, console: Console) -> Any:
        tables.append(table)
        return fit(table, console)

    with monkeypatch.context() as patch:
        patch.setattr(fit_table, "fit_table", seen)
        main([word.format(model=saved_gpt2, dumps=dumps) for word in command])
    assert tables, capsys.readouterr()
    for table in tables:
        whole = printed(table, 1000)
        for width in (50, 60, 80, 120):
            said = printed(table, width)
            assert all(len(line) <= width for line in said.splitlines())
            said, _, note = said.partition("(no room for: ")
            known = words(whole)
            for word in words(said):
                if word.rstrip(",:") not in known and word not in known:
                    within(word, known)
            left_out = note.partition(";")[0].split(", ")
            for column in table.columns:
                if column.justify == "right" and str(column.header) not in left_out:
                    assert all(str(cell) in said for cell in column.cells)


def within(word: str, known: set[str]) -> None:
    """Fail unless a line ended at a separator, before and after this piece of a name."""
    for name in known:
        start = name.find(word)
        if start >= 0:
            rest = name[start + len(word) :]
            if (start == 0 or name[start - 1] in "._/\\-") and (not rest or word[-1] in "._/\\-"):
                return
    pytest.fail(f"{word!r} is no piece of a name")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("body.out.hidden_states.layer-02", ["body.", "out.", "hidden_", "states.", "layer-02"]),
        ("1.5e-05", ["1.5e-05"]),
        ("-3.4e+38", ["-3.4e+38"]),
        ("5.20.1", ["5.20.1"]),
        ("/tmp/2026/a-b", ["/tmp/", "2026/", "a-", "b"]),
        ("8/8", ["8/8"]),
        ("layer 2 in prefill-0000", ["layer ", "2 ", "in ", "prefill-0000"]),
        (
            "any backend/of/that/is/longer/than/28",
            ["any ", "backend/", "of/", "that/", "is/", "longer/", "than/", "28"],
        ),
    ],
)
def test_where_a_line_can_end(text: str, pieces: list[str]) -> None:
    assert fit_table._pieces(text) == pieces
