"""Forced tokens: one run notes those it chose, others are left no choice but these.

Both are logits processors of transformers' generation loop, so that they serve every flow that
generates. Runs that are given the same tokens have the same inputs at every step, and can be
compared to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["keep_tokens", "replay_tokens"]


def keep_tokens(tokens: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that notes the best token of each step in ``tokens``."""

    def keep(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens.append(scores.argmax(-1))
        return scores

    return keep


def replay_tokens(
    tokens: Sequence[torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that leaves no choice but ``tokens``, one step after another."""
    left = iter(tokens)

    def replay(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = next(left, None)
        if wanted is None or wanted.shape[0] != scores.shape[0]:
            return scores
        only = scores.new_full(scores.shape, -float("inf"))
        return only.scatter(1, wanted[:, None], 0.0)

    return replay
