"""Greedy search: transformers' loop with less overhead for each token.

The loop of ``transformers.GenerationMixin`` prepares the inputs of each forward pass anew, and
wraps and unwraps its outputs. On a small model that takes a tenth of the step's time. The results
are the same: logits processors, stopping criteria and streamers are called as transformers calls
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.session.cache_buffers import Cache


class Run(Protocol):
    """Runs a model on new tokens."""

    def __call__(self, ids: Array, padding: Array, cache: Cache | None) -> tuple[Array, Cache]:
        """See `qeff_proxy.flows.generation.generate.ProxyForCausalLM.run`."""


@dataclass(frozen=True)
class Rules:
    """The objects that transformers makes of the settings of a run.

    Attributes:
        processors: Called with the ids so far and the scores of the next; returns new scores.
        criteria: Called with the ids so far; returns for each row whether it has ended.
        config: The settings; it holds the pad token for rows that have ended.
        streamer: Called with each new token.
    """

    processors: Any
    criteria: Any
    config: GenerationConfig
    streamer: Any = None


@dataclass(frozen=True)
class _Ends:
    """The two most common stopping criteria, as numbers.

    Calling those of transformers takes as long as the rest of the loop.

    Attributes:
        length: At this total length every row ends.
        tokens: The tokens that end a row.
    """

    length: int
    tokens: Array

    @classmethod
    def of(cls, criteria: Any, most: int) -> _Ends | None:
        """The criteria as numbers; ``None`` where there are criteria of other kinds."""
        tokens: list[int] = []
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                most = min(most, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                tokens += criterion.eos_token_id.flatten().tolist()
            else:
                return None
        return cls(most, np.array(tokens, np.int64))

    def reached(self, tokens: Array, length: int) -> Array:
        """Which rows end with the newest tokens ``[batch]``: ``[batch]`` bool."""
        ended = (tokens[:, None] == self.tokens).any(axis=1)
        return cast("Array", ended | (length >= self.length))


def search_greedily(
    run: Run, prompt: torch.Tensor, mask: torch.Tensor | None, rules: Rules
) -> torch.Tensor:
    """Append the likeliest token until every row has ended.

    Args:
        run: The model.
        prompt: ``[batch, query]`` int64.
        mask: ``[batch, query]``, 1 for a token and 0 for padding; ``None`` for no padding.
        rules: How to choose and when to end.

    Returns:
        ``[batch, query + new]`` int64.
    """
    batch, length = prompt.shape
    most = rules.config.max_length
    assert most is not None  # noqa: S101 (transformers has set it)
    padding = np.ones((batch, most), np.int64)
    if mask is not None:
        padding[:, :length] = to_array(mask)
    ids = torch.empty((batch, most), dtype=torch.int64)
    ids[:, :length] = prompt
    written = to_array(ids)
    unfinished = np.ones(batch, dtype=bool)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in rules.criteria)
    pad = int(rules.config._pad_token_tensor) if pads else 0  # noqa: SLF001 (as generate left it)
    ends = _Ends.of(rules.criteria, most)
    cache = None
    new = written[:, :length]
    while unfinished.any():
        logits, cache = run(new, padding[:, :length], cache)
        if rules.processors or logits.dtype != np.float32:
            scores = to_tensor(logits[:, -1].copy()).float()  # processors may write into it
            tokens = to_array(rules.processors(ids[:, :length], scores).argmax(dim=-1))
        else:
            tokens = np.argmax(logits[:, -1], axis=-1)
        written[:, length] = np.where(unfinished, tokens, pad) if pads else tokens
        new = written[:, length : length + 1]
        length += 1
        if ends is not None:
            unfinished &= ~ends.reached(new[:, 0], length)
        else:
            unfinished &= ~to_array(rules.criteria(ids[:, :length], None))
        if rules.streamer is not None:
            rules.streamer.put(ids[:, length - 1].clone())
    if rules.streamer is not None:
        rules.streamer.end()
    return ids[:, :length]
