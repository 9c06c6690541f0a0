"""The cache of a decoder between steps: handed over as arrays, or kept in place.

A session that can write into its cache (`InPlaceSession`) gets buffers with room for more
positions than are filled, so that a step copies only its own positions. Everyone else sees such a
cache as arrays by name, as long as the filled positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.session.session import Session

if TYPE_CHECKING:
    from qeff_proxy.parts import TensorSpec

#: Positions by which buffers grow: few enough that reading the empty ones costs nothing.
_BLOCK = 64

#: ``past_key_values.<layer>.key`` and ``.value`` → ``[batch, heads, past, width]``.
Cache = dict[str, "Array"]


class InPlaceSession(Session):
    """A session that can also write new keys and values into buffers of the cache."""

    @abstractmethod
    def runs_in_place(self) -> bool:
        """Whether `run_in_place` may be called: it depends on the part and on the options."""

    @abstractmethod
    def run_in_place(self, feeds: Mapping[str, Array], buffers: Buffers) -> dict[str, Array]:
        """Run the part once; write keys and values of the queries behind the filled positions.

        Args:
            feeds: As for ``run``, without the cache, and masks as long as the buffers.
            buffers: The cache; its ``filled`` does not change.

        Returns:
            The outputs that are not part of the cache.

        Raises:
            BackendError: The backend refuses the inputs, or fails.
        """


class Buffers:
    """Arrays ``[batch, heads, capacity, width]`` with a number of filled positions.

    Positions that are not filled hold zeros: a mask hides them, and zero times zero is zero.

    Args:
        specs: The part's cache inputs.
        batch: Rows.
        room: Positions that they must hold.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], batch: int, room: int) -> None:
        self.capacity = -(-room // _BLOCK) * _BLOCK
        self.filled = 0
        self.arrays: Cache = {
            name: np.zeros(
                (batch, spec.shape[1], self.capacity, spec.shape[3]),  # type: ignore[arg-type]
                numpy_dtype(spec.dtype),
            )
            for name, spec in specs.items()
        }
        #: What a session keeps with the buffers from step to step.
        self.bound: dict[object, Any] = {}

    def views(self, length: int) -> Cache:
        """The first ``length`` positions of each array."""
        return {name: array[:, :, :length] for name, array in self.arrays.items()}


class HeldCache(Cache):
    """A cache in buffers: a dict of arrays ``[batch, heads, length, width]``, views into them.

    Its values do not change when a later step goes on in the same buffers. A step from a cache
    that is no longer the newest of its buffers copies it.

    Args:
        buffers: Filled up to the length of this cache.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.length = buffers.filled
        super().__init__(buffers.views(self.length))

    def room_for(self, query: int, specs: Mapping[str, TensorSpec]) -> Buffers:
        """Buffers that hold this cache, with room for ``query`` positions more."""
        buffers = self.buffers
        needed = self.length + query
        if buffers.filled == self.length and needed <= buffers.capacity:
            return buffers
        batch = next(iter(buffers.arrays.values())).shape[0]
        longer = Buffers(specs, batch, needed)
        longer.filled = self.length
        for name, view in self.items():
            longer.arrays[name][:, :, : self.length] = view
        return longer


def can_run_in_place(session: object, cache: Cache | None) -> TypeGuard[InPlaceSession]:
    """Whether a step from ``cache`` can be run in place on ``session``."""
    if not isinstance(session, InPlaceSession) or not session.runs_in_place():
        return False
    return not cache or isinstance(cache, HeldCache)  # others are arrays of the caller's own
