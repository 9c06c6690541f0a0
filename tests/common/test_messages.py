"""Plurals and articles in messages."""

from __future__ import annotations

import numpy as np
import pytest
from qeff_proxy.common.messages import an, counted, type_named


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
