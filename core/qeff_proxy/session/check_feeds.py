"""The check before every run: are the arrays those that the part takes?

Runtimes differ in what they accept: one reads a row of 95 numbers as one of 96, PyTorch broadcasts,
ONNX Runtime refuses. Checked here, all of them refuse alike, and by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.errors import BackendError
from qeff_proxy.session.axes import Sizes, size_of, terms_of

if TYPE_CHECKING:
    from qeff_proxy.parts import TensorSpec


def check_feeds(
    part: str,
    inputs: Iterable[TensorSpec],
    feeds: Mapping[str, Array],
    known: Mapping[str, int] | None = None,
) -> Sizes:
    """Compare the arrays of a run with the part's inputs.

    Args:
        part: The part's name, for the message.
        inputs: The part's inputs. Axes of one name are of one size; an axis may be a sum of names
            (``"past + query"``).
        feeds: The arrays, by name.
        known: Sizes of axes that are known from elsewhere, by the axes' names.

    Returns:
        The size of each named axis.

    Raises:
        BackendError: An array is missing, is no input of the part, or has another dtype or shape.
    """
    specs = {spec.name: spec for spec in inputs}
    unknown = sorted(set(feeds) - set(specs))
    if unknown:
        raise BackendError(
            f"the {part} part has no input {unknown[0]!r}", f"Its inputs are {', '.join(specs)}."
        )
    sizes: Sizes = dict(known or {})
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
        for axis, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and not axis.isidentifier():
                sums.append((spec, axis, size))
            elif (sizes.setdefault(axis, size) if isinstance(axis, str) else axis) != size:
                expected = f"{axis} {sizes[axis]}" if isinstance(axis, str) else str(axis)
                raise _wrong_shape(part, spec, array.shape, f"{size} instead of {expected}")
    for spec, axis, size in sums:
        unsolved = [term for term in terms_of(axis) if not term.isdigit() and term not in sizes]
        total = size_of(axis, {**sizes, **dict.fromkeys(unsolved, 0)})
        if len(unsolved) == 1 and size >= total:
            sizes[unsolved[0]] = size - total
        elif size != total and len(unsolved) < 2:
            shape = feeds[spec.name].shape
            raise _wrong_shape(part, spec, shape, f"{size} instead of {axis} = {total}")
    return sizes


def _wrong_shape(part: str, spec: TensorSpec, shape: tuple[int, ...], what: str) -> BackendError:
    axes = ", ".join(str(axis) for axis in spec.shape)
    return BackendError(
        f"the input {spec.name!r} of the {part} part has the shape {list(shape)}, "
        f"not [{axes}]: {what}"
    )
