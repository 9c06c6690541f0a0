"""Parity: hold what a proxy generated against the uncut model in PyTorch, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qeff_proxy.arrays import to_array
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_proxy.arrays import Array
    from qeff_proxy.dump import Dump

__all__ = ["Parity", "parity_of_dump", "parity_of_logits"]


@dataclass(frozen=True)
class Parity:
    """How near a run came to the uncut model.

    Attributes:
        max_difference: Largest absolute difference of a logit, over all steps.
        largest_logit: Largest absolute logit of the uncut model.
        equal_tokens: Steps whose most likely token is the uncut model's.
        steps: Steps compared.
    """

    max_difference: float
    largest_logit: float
    equal_tokens: int
    steps: int

    @property
    def passed(self) -> bool:
        """Whether every token is equal."""
        return self.steps > 0 and self.equal_tokens == self.steps

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {**vars(self), "passed": self.passed}


def parity_of_logits(expected: Array, actual: Array) -> Parity:
    """Compare logits ``[steps, vocabulary]`` of the uncut model with those of its proxy."""
    return Parity(
        max_difference=float(np.abs(actual - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        equal_tokens=int((actual.argmax(-1) == expected.argmax(-1)).sum()),
        steps=len(expected),
    )


def parity_of_dump(
    model: PreTrainedModel,
    dump: Dump,
    *,
    ids_name: str = "input_ids",
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Parity:
    """Feed the token ids of a dump to the uncut model, and compare the logits of every step.

    Args:
        model: The uncut model.
        dump: Of a run of its split proxy on one prompt, with ``embedding`` and ``lm_head``.
        ids_name: What the uncut model calls its token ids.
        inputs: What it takes besides: features of a sound, of an image.

    Raises:
        UsageError: The dump lacks a step, or holds several prompts.
    """
    prefill = [step for step in dump.steps if step.phase == "prefill"]
    decode = [step for step in dump.steps if step.phase == "decode"]
    steps = [*prefill, *decode]
    pieces = [dump.array(step.phase, step.index, "embedding.in.input_ids") for step in steps]
    if not pieces or pieces[0].shape[0] != 1:
        raise UsageError("parity is shown on a dump of one prompt")
    ids = np.concatenate(pieces, axis=1)
    ends = np.cumsum([piece.shape[1] for piece in pieces]) - 1
    with torch.no_grad():
        outputs = model(**{ids_name: torch.from_numpy(ids)}, **(inputs or {}))
    expected = to_array(outputs.logits.float())[0]
    shown = [(int(end), step) for end, step in zip(ends, steps, strict=True)]
    if prefill:  # only the last chunk's logits decide a token
        shown = shown[len(prefill) - 1 :]
    actual: list[Array] = [
        dump.array(step.phase, step.index, "lm_head.out.logits")[0, -1].astype(np.float32)
        for _, step in shown
    ]
    return parity_of_logits(expected[[end for end, _ in shown]], np.stack(actual))
