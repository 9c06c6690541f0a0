"""Assertions of the suite: each failure says what is wrong, and what the author should do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

FunctionT = TypeVar("FunctionT", bound="Callable[..., Any]")


def needs(*capabilities: str) -> Callable[[FunctionT], FunctionT]:
    """Mark a check that needs these `Capabilities` of the family."""

    def mark(check: FunctionT) -> FunctionT:
        check.__dict__["needs"] = capabilities
        return check

    return mark


def expect(condition: object, problem: str, advice: str) -> None:
    """Fail unless ``condition`` holds.

    Args:
        condition: What must be true.
        problem: What is wrong if it is not true; names the part, tensor or site.
        advice: What the plugin's author should do.
    """
    if not condition:
        pytest.fail(f"{problem}.\n{advice}", pytrace=False)


def expect_same(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    problem: str,
    advice: str,
    tolerance: float = 0.0,
) -> None:
    """Fail unless two runs have equal results.

    Args:
        expected: Arrays, or lists of them, by name.
        actual: Those of the other run.
        problem: What is wrong if they differ.
        advice: What the plugin's author should do.
        tolerance: Largest allowed difference of an element, over the largest element of its
            array; whole numbers must be equal.
    """
    expect(
        sorted(expected) == sorted(actual),
        f"{problem}: one run gives {sorted(expected)}, the other {sorted(actual)}",
        advice,
    )
    for name, one in expected.items():
        other = actual[name]
        pairs = zip(one, other, strict=False) if isinstance(one, list) else [(one, other)]
        if isinstance(one, list):
            expect(len(one) == len(other), f"{problem}: {len(one)} and {len(other)} {name}", advice)
        for first, second in pairs:
            said = _difference(first, second, tolerance)
            expect(said is None, f"{problem}: {name} {said}", advice)


def _difference(one: Array, other: Array, tolerance: float) -> str | None:
    """How two arrays differ, in words; ``None`` if they are equal."""
    if one.shape != other.shape:
        return f"have shapes {list(one.shape)} and {list(other.shape)}"
    if one.dtype.kind in "biu":
        return None if np.array_equal(one, other) else "are not equal"
    first, second = one.astype(np.float64), other.astype(np.float64)
    if not first.size:
        return None
    difference = np.abs(first - second)
    allowed = tolerance * max(float(np.abs(first).max()), 1e-6)
    if float(difference.max()) <= allowed:  # False for NaN, too
        return None
    worst = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), one.shape)
    return (
        f"differ at {[int(i) for i in worst]}: {first[worst]:.6g} and {second[worst]:.6g}, "
        f"with {allowed:.3g} allowed"
    )
