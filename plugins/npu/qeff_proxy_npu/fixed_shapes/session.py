"""Run parts of fixed shapes on inputs of any size.

The engine feeds a part queries, a past and a batch of any length. `StaticSession` picks the
specialization, pads the inputs, runs it, and cuts its outputs back
(`qeff_proxy.backends.fixed_shapes`), so that the caller and a dump see the outputs of a backend of
dynamic shapes. A batch larger than the specialization's runs in several turns; a run of another
size on any other axis opens another specialization. Queries of a part with states are not padded:
the states would see the padding.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.backends.fixed_shapes import Plan, lowest_of, name_of, pad_into, real_region
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import Sizes, size_of, terms_of
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session
from qeff_proxy.tensor_names import is_state

__all__ = ["Specialization", "StaticSession"]

#: Specializations that are kept open; more would hold the weights as many times.
_OPEN = 4


class Specialization(Protocol):
    """A part compiled to one set of sizes, and open."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run it once, on arrays of exactly its sizes."""

    def close(self) -> None:
        """Release what it holds."""


class StaticSession(Session):
    """A part of fixed shapes, behind the session of a part of any.

    Args:
        part: The part that it runs.
        options: Of the compilation, with all lengths
            (`qeff_proxy.backends.lengths.with_fixed_shapes`).
        open_specialization: Opens the part for these sizes. It is called when a run first needs
            them, and must compile what was not compiled yet.
        lowest_mask: Masks go no lower than this, for backends that compute in a narrower type
            than the mask's; ``None``: the lowest number of the mask's own type.
    """

    def __init__(
        self,
        part: PartLike,
        options: CompileOptions,
        open_specialization: Callable[[Sizes], Specialization],
        lowest_mask: float | None = None,
    ) -> None:
        super().__init__(part)
        self._plan = Plan.of(part, options)
        self._open = open_specialization
        self._masks = {mask.name for mask in part.masks}
        self._lowest = lowest_mask
        self._sessions: OrderedDict[str, Specialization] = OrderedDict()
        self._buffers: dict[str, Array] = {}
        self._lock = threading.Lock()

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """Run the part once, or once per ``batch_size`` rows."""
        with self._lock:  # a run has the buffers to itself
            rows = sizes.get("batch", 1)
            size = self._plan.options.batch_size
            if rows <= size:
                return self._run_batch(feeds, sizes)
            self._check_rows()
            turns = []
            for start in range(0, rows, size):
                some = {
                    spec.name: feeds[spec.name][start : start + size]
                    if spec.shape and spec.shape[0] == "batch"
                    else feeds[spec.name]
                    for spec in self.part.inputs
                }
                turns.append(self._run_batch(some, {**sizes, "batch": min(size, rows - start)}))
            return {name: np.concatenate([turn[name] for turn in turns]) for name in turns[0]}

    def release(self) -> None:
        """Close every specialization that is open."""
        self._buffers.clear()
        while self._sessions:
            self._sessions.popitem()[1].close()

    def _check_rows(self) -> None:
        """Make sure that a batch can run in several turns: every output must have its rows."""
        for spec in (*self.part.inputs, *self.part.outputs):
            first = spec.shape[0] if spec.shape else None
            elsewhere = any("batch" in terms_of(axis) for axis in spec.shape[1:])
            lacks = spec in self.part.outputs and first != "batch"
            if elsewhere or lacks or (first != "batch" and "batch" in terms_of(first or "")):
                raise BackendError(
                    f"the {self.name} part cannot run a batch in several turns: "
                    f"{spec.name} is {list(spec.shape)}",
                    "Compile with a larger batch_size.",
                )

    def _run_batch(self, feeds: Mapping[str, Array], real: Mapping[str, int]) -> dict[str, Array]:
        sizes = self._plan.choose(real)
        changed = {axis for axis in sizes if sizes[axis] != real[axis]}
        if "query" in changed and any(is_state(spec.name) for spec in self.part.inputs):
            raise BackendError(
                f"{real['query']} positions of the {self.name} part would be padded to "
                f"{sizes['query']}, and its states would see the padding",
                f"Run {sizes['query']} positions, or one at a time.",
            )
        padded = {
            spec.name: self._pad(spec, feeds[spec.name], real, sizes) for spec in self.part.inputs
        }
        regions = {
            spec.name: real_region(spec, real, sizes, self.name) for spec in self.part.outputs
        }
        outputs = self._session(sizes).run(padded)
        return {name: outputs[name][region] for name, region in regions.items()}

    def _session(self, sizes: Sizes) -> Specialization:
        key = name_of(sizes)
        if key in self._sessions:
            self._sessions.move_to_end(key)
            return self._sessions[key]
        if len(self._sessions) >= _OPEN:
            self._sessions.popitem(last=False)[1].close()
        self._sessions[key] = self._open(sizes)
        return self._sessions[key]

    def _pad(self, spec: TensorSpec, array: Array, real: Mapping[str, int], sizes: Sizes) -> Array:
        shape = tuple(size_of(axis, sizes) for axis in spec.shape)
        is_mask = spec.name in self._masks
        if array.shape == shape and not (is_mask and self._lowest is not None):
            return array
        fill = None
        if is_mask:
            fill = max(lowest_of(spec.dtype), -np.inf if self._lowest is None else self._lowest)
        buffer = self._buffer(spec, shape)
        pad_into(buffer, spec, array, real, sizes, fill)
        return buffer

    def _buffer(self, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        """An array to pad into, reused while runs have this shape."""
        buffer = self._buffers.get(spec.name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[spec.name] = np.zeros(shape, numpy_dtype(spec.dtype))
        return buffer
