"""Compare an exported graph with the module it was traced from, at sizes it was not traced at.

A trace can freeze a size inside a graph whose inputs and outputs look dynamic. Running it at other
sizes finds that, and any other change on the way to ONNX.

The graph runs with all of ONNX Runtime's optimizations except constant folding, which would write a
transposed copy of each weight. Without any optimization, each run would transpose the weights (32 s
and 2.8 GB for a head of 262,208 x 2,560, instead of 2 s and 0.1 GB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from qeff_proxy.arrays import Array, numpy_dtype, to_array, to_tensor
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import ExportError
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.parts import Part, TensorSpec
from qeff_proxy.session.axes import size_of

__all__ = ["CHECK_SIZES", "check_graph"]

#: Sizes of the dynamic axes at which graphs are checked: a decode step and a first prefill.
CHECK_SIZES: tuple[dict[str, int], ...] = (
    {"batch": 1, "query": 1, "past": 9, "sequence": 11},
    {"batch": 3, "query": 4, "past": 0, "sequence": 6},
)
#: Inputs of more elements are checked at the smallest size only: the work and memory of a tower's
#: attention grow with the square of an image's size. (An image of 896 x 896 has 2.4 million;
#: the scores of its 4,096 patches take 1 GB.)
_MANY_ELEMENTS = 4_000_000
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
    generator = np.random.default_rng(seed)
    try:
        session = _open(path)
        for sizes in _sizes(part):
            feeds = _random_inputs(part, sizes, generator)
            expected = _run_part(part, feeds)
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


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Free memory is returned at once: two runs gain nothing from keeping it.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )


def _sizes(part: Part) -> list[dict[str, int]]:
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


def _random_inputs(
    part: Part, sizes: Mapping[str, int], generator: np.random.Generator
) -> dict[str, Array]:
    masks = {mask.name: mask for mask in part.masks}
    feeds: dict[str, Array] = {}
    for spec in part.inputs:
        shape = [size_of(axis, sizes) for axis in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if spec.name in masks:
            padding = np.ones((shape[0], shape[3]), np.int64)
            feeds[spec.name] = build_mask(masks[spec.name], padding, shape[2], dtype)
        elif spec.name == "padding_mask" or dtype.kind == "b":
            feeds[spec.name] = np.ones(shape, dtype)
        elif spec.name == "position_ids":
            positions = np.arange(shape[1]) + sizes.get("past", 0)
            feeds[spec.name] = np.ascontiguousarray(np.broadcast_to(positions, shape).astype(dtype))
        elif dtype.kind in "iu":
            feeds[spec.name] = generator.integers(0, 2, shape).astype(dtype)
        else:
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def _run_part(part: Part, feeds: Mapping[str, Array]) -> dict[str, Array]:
    arguments: dict[str, Any] = {
        name.replace(".", "__"): to_tensor(value) for name, value in feeds.items()
    }
    with torch.no_grad():
        outputs = part.module(**arguments)
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
    # Written so that a NaN fails.
    if not difference <= _TOLERANCES.get(spec.dtype, _TOLERANCES["float32"]):
        raise ExportError(
            f"{spec.name} of the {part.name} part differs by {difference:.3g} of its largest "
            f"element between ONNX Runtime and PyTorch ({at})",
            "A plugin can build this part in another way.",
        )
    return difference
