"""Plurals, articles, and lines that nothing folds."""

from __future__ import annotations

import numpy as np
import pytest
from qeff_proxy.cli.output import print_text
from qeff_proxy.common.messages import an, counted, type_named
from rich.table import Table


def test_one_is_singular() -> None:
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert counted(1, "tensor differs", "tensors differ") == "1 tensor differs"
    assert counted(2, "tensor differs", "tensors differ") == "2 tensors differ"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "an int"),
        ([], "a list"),
        ({}, "a dict"),
        (np.zeros(1), "an ndarray"),
        (object(), "an object"),
        (ValueError(), "a ValueError"),
        (OSError(), "an OSError"),
    ],
)
def test_a_type_has_its_article(value: object, said: str) -> None:
    assert type_named(value) == said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("embedding", "an embedding"),
        ("'embedding'", "an 'embedding'"),
        ("RMSNorm", "an RMSNorm"),
        ("MLP", "an MLP"),
        ("GPT2Config", "a GPT2Config"),
        ("Encoding", "an Encoding"),
        ("user", "a user"),
        ("uniform", "a uniform"),
        ("body", "a body"),
    ],
)
def test_an_article_goes_by_the_sound(word: str, said: str) -> None:
    assert an(word) == said


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
