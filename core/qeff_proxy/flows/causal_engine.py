"""Run a decoder's parts, step by step, on sessions of any backend.

The engine makes the inputs that no part computes: masks, positions, and the cache from the step
before. Parts pass tensors on by name (see `qeff_proxy.parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.attention_masks import build_mask, lengthen_mask
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import size_of, terms_of
from qeff_proxy.session.cache_buffers import (
    Buffers,
    Cache,
    HeldCache,
    InPlaceSession,
    can_run_in_place,
)
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session
from qeff_proxy.tensor_names import ADAPTER, PAST, PRESENT, is_state

Phase = Literal["prefill", "decode"]


class Recorder(Protocol):
    """Receives the inputs and outputs of every run of every part, to write a dump."""

    def step(
        self,
        phase: Phase,
        index: int,
        part: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        *,
        past_length: int,
    ) -> None:
        """Called once per run, with the input and output arrays by name."""


class Supplier(Protocol):
    """Supplies tensors that no part computes, such as embeddings of images."""

    def supply(
        self, part: PartLike, known: Mapping[str, Array], padding: Array
    ) -> Mapping[str, Array]:
        """Called before each part runs.

        Args:
            part: The part that runs next.
            known: The tensors of the step so far, by name: ``input_ids [batch, query]``, the
                cache, and the outputs of earlier parts.
            padding: ``[batch, past + query]`` int64, 1 for a token and 0 for padding.

        Returns:
            Arrays for this part and later ones, by name; they replace known arrays of the same
            name, and the masks and positions that the engine would build.
        """

    def chunk_end(self, start: int, stop: int) -> int:
        """Where a prefill chunk that begins at ``start`` must end so that it can end at ``stop``.

        Returns:
            ``stop``, or a later position where the tokens around ``stop`` belong together.
        """


@dataclass(frozen=True)
class StepId:
    """A prefill chunk or a decode step, numbered from 0."""

    phase: Phase
    index: int


def position_ids_of(padding: Array, query_length: int) -> Array:
    """Positions of the last ``query_length`` tokens, counted from the first non-padding token.

    Args:
        padding: ``[batch, past + query]``, 1 for a token and 0 for padding.
        query_length: The number of positions to return.

    Returns:
        ``[batch, query]`` int64; 0 where there is padding.
    """
    if query_length == 1:
        positions = np.maximum(np.sum(padding, axis=1, keepdims=True) - 1, 0)
    else:
        positions = np.maximum(np.cumsum(padding, axis=1) - 1, 0)
    return np.ascontiguousarray(positions[:, -query_length:], dtype=np.int64)


class CausalEngine:
    """The parts of a causal LM, run in order.

    Args:
        parts: In order; the last one outputs ``logits``.
        sessions: One per part, by name.
        context_length: Most positions that fit, or ``None`` for no limit.
        supplier: Supplies tensors that no part computes.
        adapter: The A and B of an adapter, for parts that take them; without it these are zeros,
            which is the base model.
    """

    def __init__(
        self,
        parts: Sequence[PartLike],
        sessions: Mapping[str, Session],
        context_length: int | None = None,
        supplier: Supplier | None = None,
        adapter: Mapping[str, Array] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self._adapter = {**_no_adapter(self.parts), **(adapter or {})}
        self._takes = [_Takes.of(part) for part in self.parts]
        self.sessions = dict(sessions)
        self.context_length = context_length
        self.supplier = supplier
        firsts = [spec for takes in self._takes if takes.cache for spec in takes.others[:1]]
        queries = [size for spec in firsts for size in spec.shape[1:2] if isinstance(size, int)]
        #: The most positions of a step; ``None`` for no limit.
        self.longest_step = min(queries, default=None)
        states = {is_state(name) for takes in self._takes for name in takes.cache}
        #: Whether the cache has states, and whether it has keys and values, which keep positions.
        self.has_states, self.keeps_positions = True in states, False in states

    def step(
        self,
        step: StepId,
        input_ids: Array,
        padding: Array,
        cache: Cache | None = None,
        *,
        last_only: bool = False,
        recorder: Recorder | None = None,
    ) -> tuple[Array, Cache]:
        """Run all parts once.

        Args:
            step: The step, for the recorder.
            input_ids: ``[batch, query]`` int64.
            padding: ``[batch, past + query]`` int64, 1 for a token and 0 for padding.
            cache: From the step before, or ``None`` on the first.
            last_only: Return the logits of the last position only.
            recorder: Receives the inputs and outputs of each part.

        Returns:
            ``logits [batch, query or 1, vocabulary]`` and the cache, one query longer.

        Raises:
            UsageError: The positions do not fit into the context.
        """
        query_length = input_ids.shape[1]
        past_length = padding.shape[1] - query_length
        self._check_room(padding.shape[1])
        known: dict[str, Array] = {"input_ids": input_ids, **self._adapter, **(cache or {})}
        present: Cache = {}
        for part, takes in zip(self.parts, self._takes, strict=True):
            if part.name == "lm_head" and last_only:
                known["last_hidden_state"] = known["last_hidden_state"][:, -1:]
            if self.supplier is not None:
                known.update(self.supplier.supply(part, known, padding))
            session = self.sessions[part.name]
            if takes.cache and can_run_in_place(session, cache):
                feeds = self._feeds(part, takes.others, known, padding, query_length)
                outputs, held = _run_in_place(session, takes, feeds, cache)
                present = held
                if recorder is not None:  # the dump must not show the buffers
                    feeds = self._feeds(
                        part, part.inputs, {**known, **feeds}, padding, query_length
                    )
                    outputs = _with_cache(outputs, held, part)
            else:
                feeds = self._feeds(part, part.inputs, known, padding, query_length)
                outputs = session.run(feeds)
            if recorder is not None:
                recorder.step(
                    step.phase, step.index, part.name, feeds, outputs, past_length=past_length
                )
            known.update(outputs)
        logits = known["logits"]
        return (logits[:, -1:] if last_only else logits), present or _cache_of(known)

    def _check_room(self, positions: int) -> None:
        if self.context_length is not None and positions > self.context_length:
            raise UsageError(
                f"{positions} positions do not fit into a context of {self.context_length}",
                "Shorten the prompt, generate fewer tokens, or compile with a larger ctx_len.",
            )

    def _feeds(
        self,
        part: PartLike,
        specs: Iterable[TensorSpec],
        known: Mapping[str, Array],
        padding: Array,
        query: int,
    ) -> dict[str, Array]:
        """The arrays for some of a part's inputs."""
        return {spec.name: self._feed(part, spec, known, padding, query) for spec in specs}

    def _feed(
        self, part: PartLike, spec: Any, known: Mapping[str, Array], padding: Array, query: int
    ) -> Array:
        """The array for one input: a known one, or one that the engine builds."""
        name = spec.name
        if name in known:
            return known[name]
        for mask in part.masks:
            if mask.name == name:
                rows = _rows_of(spec.shape[2], padding, query)
                return build_mask(mask, padding, rows, numpy_dtype(spec.dtype))
        if name == "padding_mask":
            return np.ascontiguousarray(padding, dtype=np.int64)
        if name == "position_ids":
            return position_ids_of(padding, _rows_of(spec.shape[1], padding, query))
        if name.startswith(PAST):  # no keys and values yet; states begin with zeros
            sizes = {"batch": padding.shape[0], "past": 0}
            shape = [size_of(axis, sizes) for axis in spec.shape]
            return np.zeros(shape, numpy_dtype(spec.dtype))
        raise UsageError(
            f"the {part.name} part needs an input {name!r} that nothing supplies",
            "Its plugin must give it in preprocess, or as an output of an earlier part.",
        )


def _rows_of(axis: int | str, padding: Array, query: int) -> int:
    """The queries of a mask, or positions: all there are, where a part runs over all."""
    return padding.shape[1] if "past" in terms_of(axis) else query


@dataclass(frozen=True)
class _Takes:
    """A part's inputs, classified once instead of at every step.

    Attributes:
        cache: The inputs of the cache, by name.
        others: All other inputs.
        masks: The names of the masks among these.
    """

    cache: dict[str, TensorSpec]
    others: tuple[TensorSpec, ...]
    masks: frozenset[str]

    @classmethod
    def of(cls, part: PartLike) -> _Takes:
        cache = {spec.name: spec for spec in part.inputs if spec.name.startswith(PAST)}
        others = tuple(spec for spec in part.inputs if spec.name not in cache)
        return cls(cache, others, frozenset(mask.name for mask in part.masks))


def _no_adapter(parts: Iterable[PartLike]) -> dict[str, Array]:
    """Zeros for the inputs that take an adapter."""
    specs = (spec for part in parts for spec in part.inputs if spec.name.endswith(ADAPTER))
    return {
        s.name: np.zeros([size_of(n, {}) for n in s.shape], numpy_dtype(s.dtype)) for s in specs
    }


def _run_in_place(
    session: InPlaceSession, takes: _Takes, feeds: Mapping[str, Array], cache: Cache | None
) -> tuple[dict[str, Array], HeldCache]:
    """Run a part on cache buffers; returns its other outputs, and the longer cache."""
    batch, query = feeds[takes.others[0].name].shape[:2]
    if isinstance(cache, HeldCache):
        buffers = cache.room_for(query, takes.cache)
    else:
        buffers = Buffers(takes.cache, batch, room=query)
    padded = {
        name: lengthen_mask(array, buffers.capacity) if name in takes.masks else array
        for name, array in feeds.items()
    }
    outputs = session.run_in_place(padded, buffers)
    buffers.filled += query
    return outputs, HeldCache(buffers)


def _cache_of(known: Mapping[str, Array]) -> Cache:
    """The cache in a step's outputs, under the input names of the next step."""
    return {
        name.replace(PRESENT, PAST, 1): value
        for name, value in known.items()
        if name.startswith(PRESENT)
    }


def _with_cache(outputs: Mapping[str, Array], held: Cache, part: PartLike) -> dict[str, Array]:
    """All outputs of a part, as ``run`` would have returned them."""
    present = {name.replace(PAST, PRESENT, 1): array for name, array in held.items()}
    arrays = {**outputs, **present}
    return {spec.name: arrays[spec.name] for spec in part.outputs}
