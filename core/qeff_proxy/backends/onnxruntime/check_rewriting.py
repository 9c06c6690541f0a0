"""Compare a rewritten graph with the exported one, which was compared with the model.

The masks and the cache of a step in place are as long as the buffers. A model that takes positions
or a window from the length of the keys computes something else with them, which its graph does not
show. So both graphs run on the same random inputs, at two lengths of the buffers. Axes of other
names have the sizes at which the export was checked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.onnxruntime.open_graph import open_to_check
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.errors import BackendError
from qeff_proxy.flows.attention_masks import lengthen_mask
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import axes_of, size_of
from qeff_proxy.session.cache_buffers import Buffers
from qeff_proxy.tensor_names import LAYER_NAME, PAST, PRESENT

#: A first prefill, and a step in buffers that have grown once.
_SIZES = ({"query": 3, "past": 0}, {"query": 1, "past": 66})
_OTHER_AXES = {"batch": 2, "sequence": 7}
#: Inputs with more elements (images, sounds) run as a batch of one.
_MANY_ELEMENTS = 100_000
#: Parts with more elements in their inputs (an image of 817 x 817 has) are not rewritten.
_MOST_ELEMENTS = 2_000_000
#: Largest difference of an element, over the largest element of that output.
_TOLERANCE = 1e-3
#: The same in half precision, and where activations are rounded to 8 bits.
_COARSE = 2e-2
#: Quantized weights whose outputs have a smaller cosine to the exported graph's are warned of.
_LEAST_COSINE = 0.5

#: Inputs, and the outputs to expect.
_Case = tuple[dict[str, Array], dict[str, Array]]


def computes_the_same(
    session: OnnxRuntimeSession, export: Export, part: ExportedPart, *, quantized: bool
) -> bool:
    """Whether a rewritten graph has the outputs of the exported one, on random inputs.

    It has not where nothing can be compared: the sizes of its axes are not known (an export of an
    older version does not say them), or the exported graph does not run on random inputs.

    Args:
        session: On the rewritten graph.
        export: The export.
        part: The part that was rewritten.
        quantized: Whether the weights were quantized: then its steps in place are compared with its
            own steps on a cache without empty positions, and these roughly with the exported graph.
    """
    in_place = session.runs_in_place()
    # closed before the other session reads its weights
    with OnnxRuntimeSession(open_to_check(export.folder / part.file), part) as exported:
        cases = _cases(exported, export, part)
    if not cases:
        return False
    if quantized:
        own = [(feeds, session.run(feeds)) for feeds, _ in cases]
        _warn_of_coarse_weights(part, cases, own)
        if not in_place:
            return True
        cases = own
    coarse = quantized or any(spec.dtype == "float16" for spec in part.outputs)
    tolerance = _COARSE if coarse else _TOLERANCE
    for feeds, expected in cases:
        try:
            actual = _step_in_place(session, feeds) if in_place else session.run(feeds)
        except BackendError:  # such as a table of the model's that is shorter than the buffers
            return False
        if not all(_close(actual[name], array, tolerance) for name, array in expected.items()):
            return False
    return True


def can_be_compared(export: Export, part: ExportedPart) -> bool:
    """Whether the sizes of a part's axes are known, and a run at these takes little time.

    The work of a tower's attention grows with the square of an image's size.
    """
    sizes = _sizes_of(export, part)
    others = [spec for spec in part.inputs if not LAYER_NAME.match(spec.name)]  # cheap to read
    return bool(sizes) and _elements(others, sizes[0]) <= _MOST_ELEMENTS


def _cases(session: OnnxRuntimeSession, export: Export, part: ExportedPart) -> list[_Case]:
    """Random inputs of several lengths with a session's outputs; those that it can run."""
    cases: list[_Case] = []
    for sizes in _sizes_of(export, part):
        feeds = random_inputs(part, sizes, np.random.default_rng(0))
        try:
            cases.append((feeds, session.run(feeds)))
        except BackendError:
            break
    return cases


def _sizes_of(export: Export, part: ExportedPart) -> list[dict[str, int]]:
    """The sizes of a part's axes in each case; none if they are not known."""
    axes = axes_of(part)
    checked = export.cut.get("check_sizes", {}).get(part.name, {})
    most = export.settings.get("most_positions")
    cases = []
    for lengths in _SIZES[: 1 + ("past" in axes)]:
        sizes = {**checked, **_OTHER_AXES, **lengths}
        if most is not None:
            sizes["past"] = max(0, min(sizes["past"], most - sizes["query"]))
        if set(axes) - set(sizes):
            return []
        inputs = [spec for spec in part.inputs if not spec.name.startswith(PAST)]
        if _elements(inputs, sizes) > _MANY_ELEMENTS:
            sizes["batch"] = 1
        cases.append(sizes)
    return cases


def _elements(inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> int:
    return sum(math.prod(size_of(axis, sizes) for axis in spec.shape) for spec in inputs)


def _step_in_place(session: OnnxRuntimeSession, feeds: dict[str, Array]) -> dict[str, Array]:
    """A step on buffers with empty positions, as `qeff_proxy.flows.causal_engine` makes it."""
    part = session.part
    query = feeds[part.inputs[0].name].shape[1]
    cache = {spec.name: spec for spec in part.inputs if spec.name.startswith(PAST)}
    batch, _, past, _ = feeds[next(iter(cache))].shape
    buffers = Buffers(cache, batch, past + query)
    buffers.filled = past
    for name, array in buffers.arrays.items():
        array[:, :, :past] = feeds[name]
    masks = {mask.name for mask in part.masks}
    others = {
        name: lengthen_mask(array, buffers.capacity) if name in masks else array
        for name, array in feeds.items()
        if name not in cache
    }
    outputs = session.run_in_place(others, buffers)
    views = buffers.views(past + query)
    return {**outputs, **{name.replace(PAST, PRESENT, 1): view for name, view in views.items()}}


def _warn_of_coarse_weights(
    part: ExportedPart, exported: Sequence[_Case], quantized: Sequence[_Case]
) -> None:
    """Say so where quantized weights leave little of the exported graph's outputs."""
    for name in (spec.name for spec in part.outputs):
        expected, actual = (
            np.concatenate([outputs[name].astype(np.float64).ravel() for _, outputs in cases])
            for cases in (exported, quantized)
        )
        lengths = float(np.linalg.norm(expected) * np.linalg.norm(actual))
        cosine = float(expected @ actual) / lengths if lengths else 1.0
        if not cosine >= _LEAST_COSINE:
            warnings.warn(
                f"with quantized weights, {name} of the {part.name} part has a cosine of "
                f"{cosine:.2f} to that of the exported graph, on random inputs",
                UserWarning,
                stacklevel=4,
            )
            return


def _close(actual: Array, expected: Array, tolerance: float) -> bool:
    if actual.shape != expected.shape:
        return False
    if not expected.size:
        return True
    reference = expected.astype(np.float64)
    largest = max(float(np.abs(reference).max()), 1e-6)
    return float(np.abs(actual.astype(np.float64) - reference).max()) <= tolerance * largest
