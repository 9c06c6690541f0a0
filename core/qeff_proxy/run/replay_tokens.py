"""Replay tokens: one run records the tokens that it chose, and other runs must choose the same.

Both are logits processors of transformers' generation loop, so they work for every flow that
generates. Runs with the same tokens have the same inputs at every step, and can be compared to the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keep_tokens(tokens: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that appends the best token of each step to ``tokens``."""

    def keep(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens.append(scores.argmax(-1))
        return scores

    return keep


def replay_tokens(
    tokens: Sequence[torch.Tensor],
    choices: list[torch.Tensor] | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that allows only ``tokens``, one per step.

    Args:
        tokens: To replay.
        choices: Where the best token of each step is appended, which may be another.
    """
    remaining = iter(tokens)

    def replay(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if choices is not None:
            choices.append(scores.argmax(-1))
        chosen = next(remaining, None)
        if chosen is None or chosen.shape[0] != scores.shape[0]:
            return scores
        only = scores.new_full(scores.shape, -float("inf"))
        return only.scatter(1, chosen[:, None], 0.0)

    return replay
