"""What is known of an operator: names, module, weights, and its values in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.graph.modules import module_path, names_of_modules
from qeff_proxy.isolate.blame import absolute_error, peak_of
from qeff_proxy.isolate.operators import Operators, names_read
from qeff_proxy.isolate.results import OperatorFacts, TensorFacts, WorstElement

if TYPE_CHECKING:
    from torch import nn

#: Of each dtype, the largest finite number and the smallest normal one.
_RANGES: Mapping[str, tuple[float, float]] = {
    "float16": (65504.0, 2.0**-14),
    "bfloat16": (3.3895314e38, 2.0**-126),
}
_SUMS = frozenset({"Add", "Sub", "Sum"})
#: A sum loses digits where its terms' peak is so many times its own.
_CANCELS = 100.0
#: A share of elements that is worth a word.
_MANY = 0.01


def describe_operator(
    operators: Operators, number: int, precision: str | None, module: nn.Module | None
) -> OperatorFacts:
    """Describe one operator of a layer.

    Args:
        operators: The layer.
        number: The operator's place in it.
        precision: What the backend computes in, if that is not the tensors' dtype.
        module: The part in PyTorch, to find classes and files in; ``None`` where there is none.
    """
    node = operators.nodes[number]
    path = module_path(node)
    begins, begins_in_model = names_of_modules(operators.model)
    in_model = path.replace(begins, begins_in_model, 1) if path.startswith(begins) else path
    inputs = [_tensor(operators, name, precision) for name in names_read(node)]
    outputs = [_tensor(operators, str(v.name), precision) for v in node.outputs if v.name]
    return OperatorFacts(
        node.op_type,
        str(node.name),
        in_model,
        _source(module, path),
        tuple(_weights(operators, node)),
        tuple(inputs),
        tuple([*outputs[:-1], _with_cancellation(node, inputs, outputs[-1])] if outputs else ()),
    )


def worst_element(operators: Operators, actual: Mapping[str, Array]) -> WorstElement | None:
    """The element of some operators' outputs that is furthest off, over its tensor's peak."""
    worst: tuple[float, WorstElement] | None = None
    for name, array in actual.items():
        reference = operators.values[name]
        if reference.shape != array.shape or not reference.size or reference.dtype.kind in "biu":
            continue
        error = np.nan_to_num(absolute_error(reference, array), nan=np.inf)
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
        share = float(error[index]) / (peak_of(reference) or 1.0)
        if worst is None or share > worst[0]:
            worst = share, WorstElement(name, index, float(reference[index]), float(array[index]))
    return worst[1] if worst is not None and worst[0] else None


def _tensor(operators: Operators, name: str, precision: str | None) -> TensorFacts:
    array = operators.values[name]
    dtype = array.dtype.name
    fixed = operators.is_fixed(name)
    if array.dtype.kind in "biu" or not array.size:
        return TensorFacts(name, dtype, array.shape, None, None, fixed)
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    remarks = _remarks(array, finite, precision or dtype)
    return TensorFacts(name, dtype, array.shape, low, high, fixed, tuple(remarks))


def _remarks(array: Array, finite: Array, precision: str) -> list[str]:
    remarks = []
    if finite.size < array.size:
        remarks.append(f"{array.size - finite.size} of {array.size} elements are not finite")
    if precision not in _RANGES:
        return remarks
    largest, smallest = _RANGES[precision]
    size = np.abs(finite.astype(np.float64))
    over = int(np.count_nonzero(size > largest))
    if over:
        low = float(finite.min())
        what = (
            f"a mask's {low:.3g}, which becomes -inf in {precision}"
            if low < -largest and float(finite.max()) <= largest
            else f"up to {size.max():.4g}, beyond {precision}'s largest, {largest:.5g}"
        )
        remarks.append(f"{over} of {array.size} elements are {what}")
    small = int(np.count_nonzero((size > 0) & (size < smallest)))
    if small > _MANY * array.size:
        remarks.append(
            f"{small} of {array.size} elements are subnormal in {precision} (below "
            f"{smallest:.3g}) and lose digits or become 0"
        )
    return remarks


def _with_cancellation(
    node: ir.Node, inputs: list[TensorFacts], output: TensorFacts
) -> TensorFacts:
    """Say where a sum is much smaller than its terms."""
    if node.op_type not in _SUMS or output.low is None or output.high is None:
        return output
    terms = max(
        (max(abs(t.low), abs(t.high)) for t in inputs if t.low is not None and t.high is not None),
        default=0.0,
    )
    peak = max(abs(output.low), abs(output.high))
    if not peak or terms < _CANCELS * peak:
        return output
    remark = f"its terms are up to {terms / peak:.3g} times as large and cancel"
    return TensorFacts(
        output.name,
        output.dtype,
        output.shape,
        output.low,
        output.high,
        output.weight,
        (*output.remarks, remark),
    )


def _weights(operators: Operators, node: ir.Node) -> list[str]:
    """The weights that an operator reads, or whose transpose it reads."""
    names: dict[str, None] = {}
    waiting = names_read(node)
    while waiting:
        name = waiting.pop(0)
        maker = operators.maker_of_fixed(name)
        if maker is not None:
            waiting += names_read(maker)
        elif operators.is_fixed(name) and "." in name:  # traced constants are called val_7
            names[name] = None
    return list(names)


def _source(module: nn.Module | None, path: str) -> str | None:
    """Where the modelling code of a module is: class, file and line of its ``forward``.

    Of a module of PyTorch's own, such as a linear layer, that of the module it is in.
    """
    names = path.split(".")
    # The trace's root, and what wraps it, are not in the part's module.
    starts = [names[first:] for first in range(len(names))] if module is not None else []
    for start in starts:
        for end in range(len(start), 0, -1):
            try:
                owner = type(module.get_submodule(".".join(start[:end])))  # type: ignore[union-attr]
            except AttributeError:
                break
            if owner.__module__.partition(".")[0] == "torch":
                continue
            try:
                file, line = inspect.getsourcefile(owner), inspect.getsourcelines(owner.forward)[1]
            except (OSError, TypeError):
                return None
            name = re.sub(r"^.*/site-packages/", "", str(file))
            return f"{owner.__name__}.forward, {name}:{line}"
    return None
