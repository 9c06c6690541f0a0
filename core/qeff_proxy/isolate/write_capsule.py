"""Write a capsule that is as small as the fault allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.errors import UsageError
from qeff_proxy.isolate.blame import Trials, distance
from qeff_proxy.isolate.capsule import pack, with_weights
from qeff_proxy.isolate.operators import Group, Operators, PlainRuntime, Values
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import size_of, terms_of

#: Of the error, what remains when it is still the same fault; with other weights, when it is seen.
_SAME, _STILL = 0.5, 0.1


def write_capsule(
    path: Path,
    trials: Trials,
    numbers: tuple[int, ...],
    facts: Mapping[str, Any],
    *,
    anonymous: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> str:
    """Write the operators that cause a fault to a file that runs elsewhere.

    Args:
        path: The ZIP file; one that exists is replaced.
        trials: The layer, and how its backend opens groups.
        numbers: The operators.
        facts: What to note of where it is from; JSON values.
        anonymous: Exchange the weights for random numbers of their mean and deviation.
        progress: Called with the name of each stage as it starts.

    Returns:
        What was reduced, in words.

    Raises:
        UsageError: The fault does not survive random weights.
        ArtifactError: The file cannot be written, or would be too large.
    """
    progress("reducing the capsule's inputs")
    smaller, said = _reduced(trials, numbers)
    operators = smaller.operators
    group = operators.group(numbers)
    model = with_weights(group)
    inputs = {new: np.asarray(operators.values[old]) for new, old in group.inputs.items()}
    if anonymous:
        _exchange_weights(model)
    expected = _run_plainly(model, inputs)
    with smaller.opened(replace(group, graph=replace(group.graph, model=model))) as session:
        actual = session.run(inputs)
    if anonymous and distance(expected, actual) < _STILL * _error_of_outputs(smaller, group):
        raise UsageError(
            "the fault does not show with random weights",
            "Without --anonymous the capsule holds the model's own.",
        )
    noted = {"weights": "random" if anonymous else "the model's", **facts}
    pack(path, group, inputs, expected, actual, noted)
    return said


def _error_of_outputs(trials: Trials, group: Group) -> float:
    """The group's error with the model's own weights."""
    values = trials.operators.values
    with trials.opened(group) as session:
        found = session.run({new: np.asarray(values[old]) for new, old in group.inputs.items()})
    return distance({new: values[old] for new, old in group.outputs.items()}, found)


def _reduced(trials: Trials, numbers: tuple[int, ...]) -> tuple[Trials, str]:
    """The same fault with fewer rows and shorter sequences."""
    layer = trials.operators.layer
    feeds = {spec.name: trials.operators.values[spec.name] for spec in layer.inputs}
    error = trials.error(numbers) or 0.0
    sizes = _sizes_of(layer.inputs, feeds)
    said = []
    for axis, size in list(sizes.items()):
        for fewer in dict.fromkeys(n for n in (1, size // 4, size // 2) if 0 < n < size):
            tried = {**sizes, axis: fewer}
            cut = {spec.name: _cut(feeds[spec.name], spec, sizes, tried) for spec in layer.inputs}
            with suppress(Exception):  # a graph that is not for these sizes
                attempt = trials.on(Operators(layer, cut))
                if (attempt.error(numbers) or 0.0) >= _SAME * error:
                    trials, feeds, sizes = attempt, cut, tried
                    said.append(f"{axis} {size} → {fewer}")
                    break
    return trials, ", ".join(said)


def _sizes_of(specs: tuple[TensorSpec, ...], feeds: Values) -> dict[str, int]:
    """The size of each axis that has a name of its own."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(axis, str) and axis.isidentifier()
    }


def _cut(array: Array, spec: TensorSpec, sizes: Mapping[str, int], new: Mapping[str, int]) -> Array:
    """The first elements of each axis; of a sum (``past + query``), those of each of its terms."""
    for number, axis in enumerate(spec.shape):
        places: list[int] = []
        start = 0
        for term in terms_of(axis):
            places += range(start, start + size_of(_axis(term), new))
            start += size_of(_axis(term), sizes)
        if len(places) != array.shape[number]:
            array = array.take(places, axis=number)
    return array


def _axis(term: str) -> int | str:
    return int(term) if term.isdigit() else term


def _exchange_weights(model: ir.Model) -> None:
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is None or array.dtype.kind != "f" or array.size < 2:
            continue
        random = generator.normal(array.mean(), array.std() or 1.0, array.shape)
        value.const_value = ir.tensor(random.astype(array.dtype), name=name)


def _run_plainly(model: ir.Model, inputs: Values) -> dict[str, Array]:
    plain = PlainRuntime(model)
    values = dict(inputs)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            values[name] = value.const_value.numpy()
    for node in model.graph:
        outputs = [value for value in node.outputs if value.name]
        values |= {
            str(value.name): array
            for value, array in zip(outputs, plain.run(node, values), strict=True)
        }
    return {str(value.name): values[str(value.name)] for value in model.graph.outputs}
