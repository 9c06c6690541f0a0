"""Check that a part computes the same behind the padding that fixed shapes put into its cache.

A model that takes positions from the length of its cache, and not from ``position_ids``, counts the
padding, too. Its graph does not show it, so the exported graph runs a step twice on random inputs:
as it is, and padded to a longer context.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.onnxruntime.check_rewriting import can_be_compared
from qeff_proxy.backends.onnxruntime.open_graph import open_to_check
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.session.axes import axes_of

from qeff_proxy_npu.fixed_shapes.session import StaticSession

#: A step, and the context that it is padded to.
_STEP = {"batch": 1, "query": 1, "past": 3}
_OTHERS = {"sequence": 7}
_CONTEXT = 9
#: The largest difference over the peak; padding adds nothing but other sums of zeros.
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2}


def check_padding(export: Export, part: ExportedPart) -> None:
    """Refuse a part that computes something else behind padding.

    Raises:
        BackendError: It does.
    """
    axes = set(axes_of(part))
    most = export.settings.get("most_positions")
    known = {**_OTHERS, **export.cut.get("check_sizes", {}).get(part.name, {}), **_STEP}
    if "past" not in axes or axes - set(known) or not can_be_compared(export, part):
        return
    if export.dtype not in _TOLERANCE or (most is not None and most < _CONTEXT):
        return
    sizes = {axis: known[axis] for axis in axes}
    feeds = random_inputs(part, sizes, np.random.default_rng(0))
    options = CompileOptions(ctx_len=_CONTEXT, prefill_seq_len=2)
    try:
        graph = open_to_check(export.folder / part.file)
    except Exception:  # noqa: BLE001 (ONNX Runtime's share no base class; the compiler names it)
        return
    with OnnxRuntimeSession(graph, part) as plain:
        expected = plain.run(feeds)
        padded = StaticSession(part, options, lambda _sizes: _Borrowed(plain)).run(feeds)
    for name, array in expected.items():
        if not _close(array, padded[name], _TOLERANCE[export.dtype]):
            raise BackendError(
                f"the {part.name} part computes another {name} behind padding in its cache: the "
                f"model ({export.model['model_type']}) takes positions from the cache's length",
                "It cannot be compiled to fixed shapes; onnxruntime runs it with dynamic ones.",
            )


class _Borrowed:
    """A specialization that runs the exported graph, which takes any size."""

    def __init__(self, session: OnnxRuntimeSession) -> None:
        self._session = session

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs."""
        return self._session.run(feeds)

    def close(self) -> None:
        """Its owner closes the session."""


def _close(expected: Array, actual: Array, tolerance: float) -> bool:
    one, two = expected.astype(np.float64), actual.astype(np.float64)
    peak = float(np.abs(one).max(initial=0.0))
    return bool(np.abs(one - two).max(initial=0.0) <= tolerance * peak)
