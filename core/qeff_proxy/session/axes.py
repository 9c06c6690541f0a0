"""Sizes of named axes: what the axes of a part's tensors say, read and solved.

An axis of a `qeff_proxy.parts.TensorSpec` is a number, a name (``"query"``), or a sum of these
(``"past + query"``); outputs may have other expressions, as the trace found them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.parts import TensorSpec
    from qeff_proxy.session.session import PartLike

__all__ = ["Sizes", "axes_of", "is_sum", "size_of", "sizes_of", "terms_of"]

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
    """The size of an axis that `is_sum`: ``"past + query"`` is the sum of the two."""
    if isinstance(axis, int):
        return axis
    return sum(int(term) if term.isdigit() else sizes[term] for term in terms_of(axis))


def sizes_of(specs: Iterable[TensorSpec], arrays: Mapping[str, Array]) -> Sizes:
    """Read the sizes of the named axes off the arrays.

    Args:
        specs: What the arrays should be.
        arrays: By name.

    Raises:
        BackendError: An array is missing, has another number of axes, or axes of the same name
            differ.
    """
    sizes: Sizes = {}
    sums: list[tuple[str, str, int]] = []
    for spec in specs:
        if spec.name not in arrays:
            raise BackendError(f"the input {spec.name} is missing")
        shape = arrays[spec.name].shape
        if len(shape) != len(spec.shape):
            raise BackendError(
                f"the input {spec.name} has shape {list(shape)}, not {list(spec.shape)}"
            )
        for axis, found in zip(spec.shape, shape, strict=True):
            if isinstance(axis, str) and not axis.isidentifier():
                sums.append((spec.name, axis, found))
            elif (sizes.setdefault(axis, found) if isinstance(axis, str) else axis) != found:
                wanted = sizes[axis] if isinstance(axis, str) else axis
                raise BackendError(
                    f"the input {spec.name} has shape {list(shape)}, where {axis} is {wanted}"
                )
    for name, axis, found in sums:
        _solve(name, axis, found, sizes)
    return sizes


def _solve(name: str, axis: str, found: int, sizes: Sizes) -> None:
    """Put the one size of a sum that is not known yet into ``sizes``, or check the sum."""
    unknown = [term for term in terms_of(axis) if not term.isdigit() and term not in sizes]
    if len(unknown) == 1:
        rest = size_of(axis, {**sizes, unknown[0]: 0})
        sizes[unknown[0]] = found - rest
    elif unknown or size_of(axis, sizes) != found:
        raise BackendError(f"the axis {axis} of the input {name} cannot be {found}")
