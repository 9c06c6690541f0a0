"""Output of the commands: tables and lines are not folded in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_proxy.cli.output import print_text
from rich.table import Table

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
