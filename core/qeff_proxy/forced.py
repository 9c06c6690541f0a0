"""Forced tokens: one run notes those it chose, others are left no choice but these.

Both are logits processors of transformers' generation loop, so that they serve every flow that
generates. Runs that are given the same tokens have the same inputs at every step, and can be
compared to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from qeff_proxy.dump import Dump

__all__ = ["count_equal_tokens", "keep_tokens", "replay_tokens"]


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


def count_equal_tokens(reference: Dump, candidate: Dump, *, generates: bool) -> tuple[int, int]:
    """How many tokens two runs would choose alike, and of how many.

    Args:
        reference: The dump of one run.
        candidate: That of the other, with the same steps.
        generates: Whether the last position of a step decides a token, and of the chunks of a
            prefill the last; else each position of each step does.
    """
    equal = count = 0
    steps = list(reference.steps)
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if generates and step.phase == "prefill" and after is not None and after.phase == "prefill":
            continue
        for phase, name in reference.tensors:
            if phase != step.phase or (name.direction, name.tensor) != ("out", "logits"):
                continue
            logits = (d.array(phase, step.index, str(name)) for d in (reference, candidate))
            one, two = (
                (each[..., -1:, :] if generates else each).astype(np.float32).argmax(-1)
                for each in logits
            )
            equal += int((one == two).sum()) if one.shape == two.shape else 0
            count += one.size
    return equal, count
