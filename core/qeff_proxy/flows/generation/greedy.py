"""Greedy search: what transformers' loop does, with less of it for each token.

The loop of ``transformers.GenerationMixin`` makes the inputs of a forward pass anew for each token,
and wraps and unwraps what it gives. On a small model that takes as long as a tenth of the step. The
rules are transformers' own: its logits processors, stopping criteria and streamers are called as
it calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from qeff_proxy.arrays import to_array, to_tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from qeff_proxy.arrays import Array
    from qeff_proxy.session.cache_buffers import Cache

__all__ = ["Rules", "Run", "search_greedily"]


class Run(Protocol):
    """Runs a model on new tokens."""

    def __call__(self, ids: Array, padding: Array, cache: Cache | None) -> tuple[Array, Cache]:
        """See `qeff_proxy.flows.generation.generate.ProxyForCausalLM.run`."""


@dataclass(frozen=True)
class Rules:
    """What transformers made of the settings of a run.

    Attributes:
        processors: Called with the ids so far and the scores of the next; gives other scores.
        criteria: Called with the ids so far; tells for each row whether it has come to its end.
        config: The settings; says what rows are padded with that have ended.
        streamer: Is handed each new token.
    """

    processors: Any
    criteria: Any
    config: GenerationConfig
    streamer: Any = None


@dataclass(frozen=True)
class _Ends:
    """The stopping criteria that nearly every run has, and no others, as numbers.

    To call transformers' takes as long as the rest of the loop.

    Attributes:
        length: As many tokens in all end every row.
        tokens: Each of them ends its row.
    """

    length: int
    tokens: Array

    @classmethod
    def of(cls, criteria: Any, most: int) -> _Ends | None:
        """What the criteria say; ``None`` where there are others among them."""
        tokens: list[int] = []
        for one in criteria:
            if type(one) is MaxLengthCriteria:
                most = min(most, one.max_length)
            elif type(one) is EosTokenCriteria:
                tokens += one.eos_token_id.flatten().tolist()
            else:
                return None
        return cls(most, np.array(tokens, np.int64))

    def reached(self, tokens: Array, length: int) -> Array:
        """Which rows the newest tokens ``[batch]`` end, ``[batch]`` bool."""
        ended = (tokens[:, None] == self.tokens).any(axis=1)
        return cast("Array", ended | (length >= self.length))


def search_greedily(
    run: Run, prompt: torch.Tensor, mask: torch.Tensor | None, rules: Rules
) -> torch.Tensor:
    """Append the likeliest token until every row has come to its end.

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
    pads = any(hasattr(one, "eos_token_id") for one in rules.criteria)
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
