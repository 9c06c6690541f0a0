"""Output of the commands: tables and lines are not folded in a pipe."""

from __future__ import annotations

import io
import json
import sys

import pytest
from qeff_proxy.cli import main
from qeff_proxy.cli.output import print_json, print_text, report_error, stage_display
from rich.table import Table
from rich.text import Text

pytestmark = pytest.mark.one_home


def test_a_table_in_a_pipe_folds_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "body.out." + "x" * 150
    table = Table(box=None)
    table.add_column("tensor", overflow="fold")
    table.add_column("what")
    table.add_row(name, "said " * 40)
    print_text(table)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["tensor", "what"]
    assert row.split() == [name, *["said"] * 40]


class Terminal(io.StringIO):
    """A terminal; its width is that of COLUMNS."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "lines"), [(80, 2), (44, 3)])
def test_a_table_that_is_too_wide_for_a_terminal_becomes_a_list(
    columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    table = Table(box=None)
    table.add_column("backend")
    table.add_column("first divergence", no_wrap=True)
    table.add_column("of peak", justify="right")
    table.add_row("onnxruntime", "layer 3 in prefill-0000", "6.7e-05\x1b[31m")
    print_text(table)
    said = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert len(said.splitlines()) == lines
    assert "6.7e-05" in said
    assert "layer 3 in prefill-0000" in said
    assert "6.7e-05\x1b[31m" not in said


@pytest.mark.parametrize("arguments", [["export", "/nope"], ["export"], ["export", "--bogus"]])
def test_an_error_is_json_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*arguments, "--json"])
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["exit_code"] == code > 0
    assert said.err.startswith(f"qeff-proxy: error: {error['message']}")
    assert main(arguments) == code
    assert capsys.readouterr().out == ""


#: A name of somebody else's: markup, an emoji code, and the codes that turn a terminal red.
HOSTILE = "a[/x][bold]:smile:\x1b[31m\x9b31m"
SHOWN = r"a[/x][bold]:smile:\u001b[31m\u009b31m"


def test_names_are_neither_markup_nor_codes_for_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    print_text(table)
    print_text(HOSTILE)
    print_text(Text(HOSTILE))
    report_error(HOSTILE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with stage_display(HOSTILE, quiet=False) as progress:
        progress(HOSTILE)
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 5
    assert SHOWN in err
    assert "\x1b[31m" not in out + err


def test_json_is_whole_with_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = HOSTILE + "\x7f\udcff é"
    print_json([name])
    out = capsys.readouterr().out
    assert json.loads(out) == [name]
    assert "\x9b" not in out
