"""What every session checks before it runs: that the arrays are what the part takes.

Runtimes differ in what they let pass: OpenVINO reads a row of 95 numbers as one of 96, PyTorch
broadcasts, ONNX Runtime refuses. Checked here, all of them refuse alike, and by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.parts import TensorSpec

__all__ = ["check_feeds"]


def check_feeds(
    part: str,
    inputs: Iterable[TensorSpec],
    feeds: Mapping[str, Array],
    known: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Hold the arrays of a run against what the part takes.

    Args:
        part: The part's name, for the message.
        inputs: What it takes. Axes of one name are of one size; an axis may be a sum of names
            (``"past + query"``).
        feeds: The arrays, by name.
        known: Sizes of axes that are known from elsewhere, by the axes' names.

    Returns:
        The size of each axis that has a name.

    Raises:
        BackendError: An array is missing, or none of the part's, or not of its dtype and axes.
    """
    specs = {spec.name: spec for spec in inputs}
    unknown = sorted(set(feeds) - set(specs))
    if unknown:
        raise BackendError(
            f"the {part} part has no input {unknown[0]!r}", f"Its inputs are {', '.join(specs)}."
        )
    sizes = dict(known or {})
    sums: list[tuple[TensorSpec, str, int]] = []
    for spec in specs.values():
        array = feeds.get(spec.name)
        if array is None:
            raise BackendError(f"the {part} part needs the input {spec.name!r}, which is missing")
        if array.dtype != numpy_dtype(spec.dtype):
            raise BackendError(
                f"the input {spec.name!r} of the {part} part is {array.dtype.name}, "
                f"not {spec.dtype}"
            )
        if array.ndim != len(spec.shape):
            raise _wrong_shape(part, spec, array.shape, f"{array.ndim} axes")
        for axis, found in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and not axis.isidentifier():
                sums.append((spec, axis, found))
            elif (sizes.setdefault(axis, found) if isinstance(axis, str) else axis) != found:
                wanted = f"{axis} {sizes[axis]}" if isinstance(axis, str) else str(axis)
                raise _wrong_shape(part, spec, array.shape, f"{found} instead of {wanted}")
    for spec, axis, found in sums:
        terms = [term.strip() for term in axis.split("+")]
        unsolved = [term for term in terms if not term.isdigit() and term not in sizes]
        total = sum(int(term) if term.isdigit() else sizes.get(term, 0) for term in terms)
        if len(unsolved) == 1 and unsolved[0].isidentifier() and found >= total:
            sizes[unsolved[0]] = found - total
        elif not unsolved and found != total:
            shape = feeds[spec.name].shape
            raise _wrong_shape(part, spec, shape, f"{found} instead of {axis} = {total}")
    return sizes


def _wrong_shape(part: str, spec: TensorSpec, shape: tuple[int, ...], what: str) -> BackendError:
    axes = ", ".join(str(axis) for axis in spec.shape)
    return BackendError(
        f"the input {spec.name!r} of the {part} part has the shape {list(shape)}, "
        f"not [{axes}]: {what}"
    )
