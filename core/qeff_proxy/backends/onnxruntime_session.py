"""Sessions of ONNX Runtime: arrays in and out, and a cache that is written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.backends.feeds import check_feeds
from qeff_proxy.cache import PAST, PRESENT, Buffers
from qeff_proxy.errors import BackendError
from qeff_proxy.reasons import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnxruntime

    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact import ExportedPart

__all__ = ["PLACES", "OnnxRuntimeSession", "places_of"]

#: Inputs ``[batch, heads, query, 3]`` int64: row, head and position of each new key or value.
PLACES = "cache_places."


class OnnxRuntimeSession:
    """A part on ONNX Runtime's CPU.

    Args:
        session: The runtime's own session.
        part: What it runs, for messages.
    """

    def __init__(self, session: onnxruntime.InferenceSession, part: ExportedPart) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._part = part
        self._names = [spec.name for spec in part.outputs]
        self._cache = {spec.name: spec for spec in part.inputs if spec.name.startswith(PAST)}
        inputs = [value.name for value in session.get_inputs()]
        self._heads = [int(n.removeprefix(PLACES)) for n in inputs if n.startswith(PLACES)]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        session = self._opened()
        check_feeds(self._part.name, self._part.inputs, feeds)
        if self._heads:
            return self._run_on_copies(feeds)
        try:
            outputs = session.run(self._names, dict(feeds))
        except Exception as error:  # the runtime's exceptions share no public base class
            raise self._failed(error) from error
        return dict(zip(self._names, outputs, strict=True))

    def runs_in_place(self) -> bool:
        """Whether the graph writes its cache in place."""
        return bool(self._heads)

    def run_in_place(self, feeds: Mapping[str, Array], buffers: Buffers) -> dict[str, Array]:
        """Run the part on buffers (see `qeff_proxy.cache.InPlaceSession.run_in_place`)."""
        query = feeds[self._part.inputs[0].name].shape[1]
        shortened = {name: array[:, :, query:] for name, array in buffers.arrays.items()}
        check_feeds(self._part.name, self._part.inputs, {**feeds, **shortened})
        binding = buffers.bound.get(self)
        if binding is None:  # the first step on these buffers
            binding = buffers.bound[self] = self._bind_cache(buffers.arrays)
        return self._run_bound(binding, feeds, buffers.filled)

    def close(self) -> None:
        """Release the runtime's session and the weights it maps."""
        self._session = None

    def _run_on_copies(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on copies of the past that have room for the new positions, and no more."""
        query = feeds[self._part.inputs[0].name].shape[1]
        arrays: dict[str, Array] = {}
        past = 0
        for name in self._cache:
            array = feeds[name]
            batch, heads, past, width = array.shape
            arrays[name] = np.empty((batch, heads, past + query, width), array.dtype)
            arrays[name][:, :, :past] = array
            arrays[name][:, :, past:] = 0
        others = {name: array for name, array in feeds.items() if name not in arrays}
        outputs = self._run_bound(self._bind_cache(arrays), others, past)
        outputs |= {PRESENT + name.removeprefix(PAST): array for name, array in arrays.items()}
        return {name: outputs[name] for name in self._names}

    def _bind_cache(self, cache: Mapping[str, Array]) -> onnxruntime.IOBinding:
        """Have each array of the cache for an input and for an output."""
        binding = self._opened().io_binding()
        for name, array in cache.items():
            _bind(binding.bind_input, name, array)
            _bind(binding.bind_output, PRESENT + name.removeprefix(PAST), array)
        return binding

    def _run_bound(
        self, binding: onnxruntime.IOBinding, feeds: Mapping[str, Array], start: int
    ) -> dict[str, Array]:
        """Run with the cache that is bound, from the position ``start`` on."""
        session = self._opened()
        batch, query = feeds[self._part.inputs[0].name].shape[:2]
        given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        given |= {f"{PLACES}{h}": places_of(batch, h, start, query) for h in self._heads}
        for name, array in given.items():
            _bind(binding.bind_input, name, array)
        others = [name for name in self._names if not name.startswith(PRESENT)]
        for name in others:
            binding.bind_output(name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the runtime's exceptions share no public base class
            raise self._failed(error) from error
        outputs = binding.get_outputs()[-len(others) :]  # the cache's were bound before
        return {name: value.numpy() for name, value in zip(others, outputs, strict=True)}

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise BackendError(f"the session of the {self._part.name} part is closed")
        return self._session

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime failed on the {self._part.name} part: {first_line(error)}"
        )


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
