"""Named axes of a part's tensors, and their sizes.

An axis of a `qeff_proxy.parts.TensorSpec` is a number, a name (``"query"``), or a sum of these
(``"past + query"``). Outputs may have other expressions, as the trace found them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qeff_proxy.session.part_like import PartLike

#: Axis name → size.
Sizes = dict[str, int]

_SUM = re.compile(r"\w+(\s*\+\s*\w+)*")


def is_sum(axis: int | str) -> bool:
    """Whether an axis is a number, a name, or a sum of names and numbers."""
    return isinstance(axis, int) or _SUM.fullmatch(axis.strip()) is not None


def terms_of(axis: int | str) -> list[str]:
    """The names and numbers of a sum, in order."""
    return re.findall(r"\w+", str(axis))


def axes_of(part: PartLike) -> tuple[str, ...]:
    """Names of the dynamic axes of a part's inputs, in the order in which they come."""
    names = (
        term
        for spec in part.inputs
        for axis in spec.shape
        for term in terms_of(axis)
        if not term.isdigit()
    )
    return tuple(dict.fromkeys(names))


def size_of(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: a number, a named axis, or a sum of these (`is_sum`)."""
    if isinstance(axis, int):
        return axis
    if axis in sizes:
        return sizes[axis]
    return sum(int(term) if term.isdigit() else sizes[term] for term in terms_of(axis))
