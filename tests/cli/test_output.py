"""Output of the commands: tables and lines are not folded in a pipe."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from qeff_proxy.cli.output import print_json, print_text, report_error, stage_display
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pytest


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
