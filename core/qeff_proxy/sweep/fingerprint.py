"""A few numbers of each layer's output, to compare a run with a much earlier one without its dumps.

The sketch of a tensor is its product with a few random vectors of ±1: the mean square of the
differences of two sketches estimates the square of the distance of the tensors
(Achlioptas 2003, "Database-friendly random projections").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump import TensorName, read_dump

#: Products of a sketch, and the layers that a fingerprint has at most: some kB in all.
_PRODUCTS = 4
_LAYERS = 48


def take_fingerprint(folder: Path) -> dict[str, Any]:
    """The fingerprint of a dump: of the layers' outputs and the final ones, in the first step.

    Returns:
        Tensor → ``[hash, root mean square, largest magnitude, sketch …]``.
    """
    outputs = list(_outputs(folder))
    layers = [name for name, _ in outputs if name.layer is not None]
    stride = max(1, math.ceil(len(layers) / _LAYERS))
    kept = {*layers[::stride], *layers[-1:]}
    return {
        str(name): _described(values())
        for name, values in outputs
        if name.layer is None or name in kept
    }


def distance(one: Mapping[str, Any], other: Mapping[str, Any], tensor: str) -> float | None:
    """The estimated distance of a tensor in two fingerprints, over its norm; ``None``: unknown."""
    first, second = one.get(tensor), other.get(tensor)
    if first is None or second is None or first[0] == second[0]:
        return None if first is None or second is None else 0.0
    if None in (*first, *second):
        return math.inf
    size = math.sqrt(sum(value**2 for value in first[3:]) / _PRODUCTS)
    apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(first[3:], second[3:], strict=True)))
    return apart / math.sqrt(_PRODUCTS) / size if size else math.inf


def find_dead_output(folder: Path) -> str | None:
    """An output of a dump in which all values are equal, or none is finite; ``None`` if none is."""
    for name, values in _outputs(folder):
        array = values()
        finite = array[np.isfinite(array)]
        if array.size > 1 and (finite.size == 0 or finite.min() == finite.max()):
            return str(name)
    return None


def _outputs(folder: Path) -> Iterator[tuple[TensorName, Any]]:
    """One output of each layer and the final ones, in the first step, with a function to read."""
    dump = read_dump(folder)
    step = dump.steps[0]
    seen: set[tuple[str, int]] = set()
    for phase, name in dump.tensors:
        if phase != step.phase or name.direction != "out" or name.tensor.startswith("present"):
            continue
        if name.layer is not None:
            if (name.part, name.layer) in seen:
                continue
            seen.add((name.part, name.layer))

        def values(name: TensorName = name) -> NDArray[np.float32]:
            return dump.array(step.phase, step.index, name).astype(np.float32)

        yield name, values


def _described(array: NDArray[np.float32]) -> list[Any]:
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:8]
    flat = array.reshape(-1).astype(np.float64)
    if not np.isfinite(flat).all() or flat.size == 0:
        return [digest, *[None] * (2 + _PRODUCTS)]
    generator = np.random.Generator(np.random.PCG64(flat.size))
    products = [
        float(flat @ (generator.integers(0, 2, flat.size, np.int8) * 2.0 - 1.0))
        for _ in range(_PRODUCTS)
    ]
    numbers = [math.sqrt(float(flat @ flat) / flat.size), float(np.abs(flat).max()), *products]
    return [digest, *(float(f"{number:.4g}") for number in numbers)]
