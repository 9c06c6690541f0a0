"""Compare a rewritten graph with the exported one, which was compared with the model.

The masks and the cache of a step in place are as long as the buffers. A model that takes positions
or a window from the length of the keys computes something else with them, which its graph does not
show. So both graphs run on the same random inputs, at two lengths of the buffers.
"""

from __future__ import annotations

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.onnxruntime.open_graph import open_to_check
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.errors import BackendError
from qeff_proxy.flows.attention_masks import lengthen_mask
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.session.axes import axes_of
from qeff_proxy.session.cache_buffers import Buffers
from qeff_proxy.tensor_names import PAST, PRESENT

#: A first prefill, and a step in buffers that have grown once.
_SIZES = ({"query": 3, "past": 0}, {"query": 1, "past": 66})
_OTHER_AXES = {"batch": 2, "sequence": 7}
#: Parts with more elements in their inputs (images, sounds) take too long to run here.
_MOST_ELEMENTS = 100_000
#: Largest difference of an element, over the largest element of that output.
_TOLERANCE = 1e-3
#: The same in half precision, and where activations are rounded to 8 bits.
_COARSE = 2e-2

#: Inputs, and the outputs to expect.
_Case = tuple[dict[str, Array], dict[str, Array]]


def computes_the_same(
    session: OnnxRuntimeSession, export: Export, part: ExportedPart, *, quantized: bool
) -> bool:
    """Whether a rewritten graph has the outputs of the exported one, on random inputs.

    Nothing is compared where a part has axes whose sizes are not known, or very large inputs, or
    where the exported graph does not run on random inputs.

    Args:
        session: On the rewritten graph.
        export: The export.
        part: The part that was rewritten.
        quantized: Whether the weights were quantized: then its steps in place are compared with its
            own steps on a cache without empty positions.
    """
    in_place = session.runs_in_place()
    if quantized and not in_place:
        return True
    if quantized:
        cases = _cases(session, export, part)
    else:  # closed before the other session reads its weights
        with OnnxRuntimeSession(open_to_check(export.folder / part.file), part) as exported:
            cases = _cases(exported, export, part)
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


def _cases(session: OnnxRuntimeSession, export: Export, part: ExportedPart) -> list[_Case]:
    """Random inputs of several lengths with a session's outputs; those that it can run."""
    axes = axes_of(part)
    most = export.settings.get("most_positions")
    cases: list[_Case] = []
    for lengths in _SIZES[: 1 + ("past" in axes)]:
        sizes = {**_OTHER_AXES, **lengths}
        if most is not None:
            sizes["past"] = max(0, min(sizes["past"], most - sizes["query"]))
        if set(axes) - set(sizes):
            break
        feeds = random_inputs(part, sizes, np.random.default_rng(0))
        if sum(a.size for name, a in feeds.items() if not name.startswith(PAST)) > _MOST_ELEMENTS:
            break
        try:
            cases.append((feeds, session.run(feeds)))
        except BackendError:
            break
    return cases


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


def _close(actual: Array, expected: Array, tolerance: float) -> bool:
    if actual.shape != expected.shape:
        return False
    if not expected.size:
        return True
    reference = expected.astype(np.float64)
    largest = max(float(np.abs(reference).max()), 1e-6)
    return float(np.abs(actual.astype(np.float64) - reference).max()) <= tolerance * largest
