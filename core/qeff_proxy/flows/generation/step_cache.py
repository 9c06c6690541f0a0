"""The engine's cache, in the form that transformers' generation loop passes between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qeff_proxy.arrays import to_array, to_tensor
from qeff_proxy.session.cache_buffers import Cache

if TYPE_CHECKING:
    import torch


class StepCache(DynamicCache):  # type: ignore[misc]
    """A cache that keeps the engine's arrays unchanged for the next step.

    They are converted to tensors only where the loop changes the cache: to reorder beams or to
    remove positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: Cache | None = None

    @classmethod
    def of(cls, cache: DynamicCache | None) -> StepCache:
        """``cache`` itself, or a `StepCache` with its contents."""
        if isinstance(cache, cls):
            return cache
        made = cls()
        if cache is not None and cache.layers:
            made.hold(arrays_of_cache(cache))
        return made

    def hold(self, arrays: Cache) -> None:
        """Replace the contents by ``arrays`` (``past_key_values.<layer>.key`` …)."""
        self._held = arrays
        self.layers.clear()

    def arrays(self) -> Cache:
        """The contents, in the engine's form."""
        return self._held if self._held is not None else arrays_of_cache(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of cached positions."""
        if self._held is None:
            return int(super().get_seq_length(layer_idx))
        return int(next(iter(self._held.values())).shape[2]) if self._held else 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows in the order of ``beam_idx``."""
        self._to_tensors().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; their number is given as a negative number."""
        self._to_tensors().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._to_tensors().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._to_tensors().batch_select_indices(indices)

    def _to_tensors(self) -> Any:
        """Convert the arrays to the layers that transformers' code works on."""
        if self._held is not None:
            fill_cache(self._held, self)
            self._held = None
        return super()


def arrays_of_cache(cache: DynamicCache | None) -> Cache:
    """The contents of a transformers cache, in the engine's form."""
    arrays: Cache = {}
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        arrays[f"past_key_values.{index}.key"] = to_array(layer.keys)
        arrays[f"past_key_values.{index}.value"] = to_array(layer.values)
    return arrays


def fill_cache(arrays: Cache, cache: DynamicCache | None) -> DynamicCache:
    """Put the arrays into ``cache``, so that transformers' code can change it."""
    cache = cache if cache is not None else DynamicCache()
    for index in range(len(arrays) // 2):
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        keys = to_tensor(arrays[f"past_key_values.{index}.key"])
        if not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
        layer.keys = keys
        layer.values = to_tensor(arrays[f"past_key_values.{index}.value"])
    return cache
