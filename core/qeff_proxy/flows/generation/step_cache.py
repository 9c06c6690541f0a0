"""The engine's cache, in the form that transformers' generation loop passes between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.errors import UsageError
from qeff_proxy.session.cache_buffers import Cache
from qeff_proxy.tensor_names import is_state

if TYPE_CHECKING:
    import torch


class StepCache(DynamicCache):  # type: ignore[misc]
    """A cache that keeps the engine's arrays unchanged for the next step.

    The loop may reorder, repeat and choose rows, and remove the last positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: Cache = {}
        self._length = 0

    @classmethod
    def of(cls, cache: DynamicCache | None) -> StepCache:
        """``cache`` itself, or a `StepCache` with its contents."""
        if isinstance(cache, cls):
            return cache
        made = cls()
        if cache is not None and cache.layers:
            made.hold(arrays_of_cache(cache), int(cache.get_seq_length()))
        return made

    def hold(self, arrays: Cache, length: int) -> None:
        """Replace the contents by ``arrays`` (``past_key_values.<layer>.key`` …).

        Args:
            arrays: The cache.
            length: How many positions were run.
        """
        self._held = arrays
        self._length = length

    def arrays(self) -> Cache:
        """The contents, in the engine's form."""
        return self._held

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (as transformers calls it)
        """The number of positions that were run."""
        return self._length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows in the order of ``beam_idx``."""
        self._change(lambda array: array[to_array(beam_idx)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; their number is given as a negative number.

        Raises:
            UsageError: A state has all positions in it.
        """
        if tokens_to_remove and any(map(is_state, self._held)):
            raise UsageError(
                "the last positions cannot be taken back from the states of this model's layers",
                "Generate without prompt lookup and without an assistant.",
            )
        self._length += tokens_to_remove
        self._change(lambda array: array[:, :, : self._length])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change(lambda array: np.repeat(array, repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self.reorder_cache(indices)

    def _change(self, change: Callable[[Array], Array]) -> None:
        self._held = {
            name: np.ascontiguousarray(change(array)) for name, array in self._held.items()
        }


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
