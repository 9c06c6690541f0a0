"""Sessions of ONNX Runtime: arrays in and out, and a cache that is written in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import ArtifactError, BackendError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import size_of
from qeff_proxy.session.cache_buffers import Buffers, InPlaceSession
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.tensor_names import PAST, PRESENT

if TYPE_CHECKING:
    import onnxruntime

#: Inputs ``[batch, heads, query, 3]`` int64: row, head and position of each new key or value.
PLACES = "cache_places."
_AGAIN = "Export the model again."


class _Bound:
    """Arrays that are bound once and used at every step: binding takes longer than copying.

    Args:
        binding: The runtime's own, with the cache bound.
    """

    def __init__(self, binding: onnxruntime.IOBinding) -> None:
        self.binding = binding
        self._inputs: dict[str, Array] = {}
        self._outputs: dict[str, Array] = {}

    def put(self, name: str, array: Array) -> None:
        """Copy an array into the bound input."""
        held = self._inputs.get(name)
        if held is None or held.shape != array.shape:
            held = self._inputs[name] = np.array(array, order="C")
            _bind(self.binding.bind_input, name, held)
        else:
            np.copyto(held, array)

    def expect(self, spec: TensorSpec, sizes: Mapping[str, int]) -> None:
        """Bind an output of the size that this step has."""
        try:
            shape = tuple(size_of(axis, sizes) for axis in spec.shape)
        except KeyError as error:
            raise ArtifactError(
                f"the axis {error} of {spec.name} in export.json is an axis of no input", _AGAIN
            ) from error
        held = self._outputs.get(spec.name)
        if held is None or held.shape != shape:
            held = self._outputs[spec.name] = np.empty(shape, numpy_dtype(spec.dtype))
            _bind(self.binding.bind_output, spec.name, held)

    def take(self, name: str) -> Array:
        """A copy of an output, because the next step overwrites it."""
        return self._outputs[name].copy()


class OnnxRuntimeSession(InPlaceSession):
    """A part on ONNX Runtime's CPU.

    Args:
        session: The runtime's own session.
        part: The part that it runs.
    """

    def __init__(self, session: onnxruntime.InferenceSession, part: PartLike) -> None:
        super().__init__(part)
        self._session = session
        self._names = [spec.name for spec in part.outputs]
        self._cache = {spec.name: spec for spec in part.inputs if spec.name.startswith(PAST)}
        self._others = [spec for spec in part.inputs if spec.name not in self._cache]
        self._outputs = [spec for spec in part.outputs if not spec.name.startswith(PRESENT)]
        inputs = [value.name for value in session.get_inputs()]
        known = {*inputs, *(value.name for value in session.get_outputs())}
        for spec in (*part.inputs, *part.outputs):
            if spec.name not in known:
                raise ArtifactError(
                    f"export.json names {spec.name}, which the graph of the {part.name} part does "
                    "not have",
                    _AGAIN,
                )
        self._heads = [int(n.removeprefix(PLACES)) for n in inputs if n.startswith(PLACES)]

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """Run the graph once, on copies of the past if it writes its cache in place."""
        if self._heads:
            return self._run_on_copies(feeds, sizes)
        with self._failing():
            outputs = self._session.run(self._names, dict(feeds))
        return dict(zip(self._names, outputs, strict=True))

    def runs_in_place(self) -> bool:
        """Whether the graph writes its cache in place."""
        return bool(self._heads)

    def run_in_place(self, feeds: Mapping[str, Array], buffers: Buffers) -> dict[str, Array]:
        """Run the part on buffers (see `qeff_proxy.session.InPlaceSession.run_in_place`)."""
        self.check_open()
        query = feeds[self.part.inputs[0].name].shape[1]
        sizes = self.check(self._others, feeds, self._cache_sizes(buffers.arrays, query))
        bound = buffers.bound.get(self)
        if bound is None:  # the first step on these buffers
            bound = buffers.bound[self] = self._bind_cache(buffers.arrays)
        return self._run_bound(bound, feeds, buffers.filled, sizes)

    def release(self) -> None:
        """Release the runtime's session and the weights it maps."""
        del self._session

    def _run_on_copies(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run on copies of the past that have room for the new positions, and no more."""
        query = feeds[self.part.inputs[0].name].shape[1]
        arrays: dict[str, Array] = {}
        past = 0
        for name in self._cache:
            array = feeds[name]
            batch, heads, past, width = array.shape
            arrays[name] = np.empty((batch, heads, past + query, width), array.dtype)
            arrays[name][:, :, :past] = array
            arrays[name][:, :, past:] = 0
        others = {name: array for name, array in feeds.items() if name not in arrays}
        outputs = self._run_bound(self._bind_cache(arrays), others, past, sizes)
        outputs |= {PRESENT + name.removeprefix(PAST): array for name, array in arrays.items()}
        return {name: outputs[name] for name in self._names}

    def _cache_sizes(self, cache: Mapping[str, Array], query: int) -> dict[str, int]:
        """Sizes of the cache's axes; the past is as long as the buffers without the queries."""
        name, spec = next(iter(self._cache.items()))
        shape = list(cache[name].shape)
        shape[2] -= query
        return {axis: n for axis, n in zip(spec.shape, shape, strict=True) if isinstance(axis, str)}

    def _bind_cache(self, cache: Mapping[str, Array]) -> _Bound:
        """Bind each array of the cache as an input and as an output."""
        bound = _Bound(self._session.io_binding())
        for name, array in cache.items():
            _bind(bound.binding.bind_input, name, array)
            _bind(bound.binding.bind_output, PRESENT + name.removeprefix(PAST), array)
        return bound

    def _run_bound(
        self, bound: _Bound, feeds: Mapping[str, Array], start: int, sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run with a bound cache, whose new positions begin at ``start``."""
        batch, query = feeds[self.part.inputs[0].name].shape[:2]
        for name, array in feeds.items():
            bound.put(name, array)
        for heads in self._heads:
            bound.put(f"{PLACES}{heads}", places_of(batch, heads, start, query))
        for spec in self._outputs:
            bound.expect(spec, sizes)
        with self._failing():
            self._session.run_with_iobinding(bound.binding)
        return {spec.name: bound.take(spec.name) for spec in self._outputs}

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Say which part failed."""
        try:
            yield
        except Exception as error:  # the runtime's exceptions share no public base class
            raise BackendError(
                f"ONNX Runtime failed on the {self.name} part: {first_line(error)}"
            ) from error


def places_of(batch: int, heads: int, start: int, query: int) -> Array:
    """``[batch, heads, query, 3]`` int64: row, head and position of ``query`` new positions."""
    places = np.empty((batch, heads, query, 3), np.int64)
    places[..., 0] = np.arange(batch)[:, None, None]
    places[..., 1] = np.arange(heads)[None, :, None]
    places[..., 2] = np.arange(start, start + query)
    return places


def _bind(bind: Any, name: str, array: Array) -> None:
    """Bind an array's own memory."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
