"""Compare an exported graph with the module it was traced from, at sizes it was not traced at.

A trace can freeze a size inside a graph whose inputs and outputs look dynamic. Running it at other
sizes finds that, and any other change on the way to ONNX. The second run starts behind the position
where rotary factors change. A part that does not take positions would need a run of that length,
which is made up to `_LONGEST` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.backends.onnxruntime.open_graph import open_to_check
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import ExportError
from qeff_proxy.families.rotary import rotary_limits
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.load.mapped_memory import few_pages, few_pages_of
from qeff_proxy.parts import Part, TensorSpec
from qeff_proxy.session.adapter_slots import run_module
from qeff_proxy.session.axes import size_of
from qeff_proxy.tensor_names import ADAPTER

#: Sizes of the dynamic axes at which graphs are checked: a decode step and a first prefill.
CHECK_SIZES: tuple[dict[str, int], ...] = (
    {"batch": 1, "query": 1, "past": 9, "sequence": 11},
    {"batch": 3, "query": 4, "past": 0, "sequence": 6},
)
#: Inputs of more elements are checked at the smallest size only: the work and memory of a tower's
#: attention grow with the square of an image's size. (An image of 896 x 896 has 2.4 million;
#: the scores of its 4,096 patches take 1 GB.)
_MANY_ELEMENTS = 4_000_000
#: The longest run that is made to pass the position where rotary factors change.
_LONGEST = 256
#: Largest allowed difference of an element, over the largest element of that output.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2}


def check_graph(
    part: Part,
    inputs: Sequence[TensorSpec],
    path: Path,
    seed: int = 0,
) -> float | None:
    """Run the graph in ONNX Runtime and the part in PyTorch on the same random inputs.

    Args:
        part: What was traced.
        inputs: The graph's inputs: those of the part that reach an output.
        path: The ONNX file.
        seed: Of the inputs.

    Returns:
        The largest difference of an element over the largest element of its output, or ``None``
        where ONNX Runtime has no kernels for the part's dtype (bfloat16).

    Raises:
        ExportError: The graph does not run, or its outputs differ from the part's.
    """
    if any(spec.dtype == "bfloat16" for spec in (*part.inputs, *part.outputs)):
        return None
    worst = 0.0
    adapter = tuple(spec for spec in inputs if spec.name.endswith(ADAPTER))
    part = replace(part, inputs=(*part.inputs, *adapter))
    generator = np.random.default_rng(seed)
    try:
        session = open_to_check(path)
        limit = _rotary_limit(part)
        for index, sizes in enumerate(sizes_to_check(part)):
            if index and limit < _LONGEST and "sequence" in sizes:
                sizes = {**sizes, "sequence": max(sizes["sequence"], limit + 2)}
            feeds = random_inputs(part, sizes, generator, index * limit)
            expected = _run_part(part, feeds)
            with few_pages_of(path.parent):
                outputs = session.run(None, {spec.name: feeds[spec.name] for spec in inputs})
            for spec, actual in zip(part.outputs, outputs, strict=True):
                worst = max(worst, _difference(part, spec, expected[spec.name], actual, sizes))
    except ExportError:
        raise
    except Exception as error:  # the runtime's exceptions share no public base class
        line = first_line(error)
        raise ExportError(
            f"the graph of the {part.name} part does not run in ONNX Runtime: {line}",
            "The trace may have frozen a size; a plugin can build this part in another way.",
        ) from error
    return worst


def _rotary_limit(part: Part) -> int:
    """The last position where rotary factors change; 0 if they do not."""
    configs = {id(m.config): m.config for m in part.module.modules() if hasattr(m, "config")}
    limits = (limit for config in configs.values() for _, limit in rotary_limits(config))
    return max(limits, default=0)


def sizes_to_check(part: Part) -> list[dict[str, int]]:
    """Sizes of all axes to check a part at: those that are affordable, or the smallest."""
    special = part.check_sizes or ({},) * len(CHECK_SIZES)
    all_sizes = [
        {**part.trace_sizes, **sizes, **more}
        for sizes, more in zip(CHECK_SIZES, special, strict=True)
    ]
    elements = [
        sum(math.prod(size_of(axis, sizes) for axis in spec.shape) for spec in part.inputs)
        for sizes in all_sizes
    ]
    limit = max(_MANY_ELEMENTS, min(elements))
    return [sizes for sizes, count in zip(all_sizes, elements, strict=True) if count <= limit]


def _run_part(part: Part, feeds: Mapping[str, Array]) -> dict[str, Array]:
    with few_pages(part.module):
        outputs = run_module(part.module, {n: to_tensor(value) for n, value in feeds.items()})
    return {name: to_array(value) for name, value in outputs.items()}


def _difference(
    part: Part, spec: TensorSpec, expected: Array, actual: Array, sizes: Mapping[str, int]
) -> float:
    at = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if expected.shape != actual.shape:
        raise ExportError(
            f"{spec.name} of the {part.name} part has shape {list(actual.shape)} in ONNX Runtime "
            f"and {list(expected.shape)} in PyTorch ({at})",
            "The trace froze a size; a plugin can build this part in another way.",
        )
    if expected.size == 0:
        return 0.0
    reference = expected.astype(np.float64)
    largest = max(float(np.abs(reference).max()), 1e-6)
    difference = float(np.abs(actual.astype(np.float64) - reference).max()) / largest
    # A state in float32 is as coarse as the half precision that it is computed in.
    specs = (*part.inputs, *part.outputs)
    tolerance = max(_TOLERANCES.get(one.dtype, _TOLERANCES["float32"]) for one in specs)
    # Written so that a NaN fails.
    if not difference <= tolerance:
        raise ExportError(
            f"{spec.name} of the {part.name} part differs by {difference:.3g} of its largest "
            f"element between ONNX Runtime and PyTorch ({at})",
            "A plugin can build this part in another way.",
        )
    return difference
