"""Tokenize prompts; shared by all families that generate text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    import torch


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, left: bool = True
) -> dict[str, torch.Tensor]:
    """Tokenize prompts for generation, padded to one length.

    Args:
        tokenizer: A transformers tokenizer. Its settings stay unchanged.
        prompts: One text per row; none may be empty.
        left: Pad on the left, as a decoder needs it; an encoder's texts are padded on the right.

    Returns:
        ``input_ids`` and ``attention_mask``, both ``[batch, sequence]`` int64. Without a pad
        token, the end-of-sequence token pads, hidden by the mask as any padding is.

    Raises:
        UsageError: A prompt is empty or has no token, or ``tokenizer`` is no tokenizer.
    """
    import torch

    if not callable(tokenizer):
        raise UsageError(
            f"{type_named(tokenizer)} is no tokenizer",
            "Pass a tokenizer of transformers, or leave it out for the checkpoint's own.",
        )
    for prompt in prompts:
        if not isinstance(prompt, str) or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UsageError(
                f"the prompt {prompt!r} is no text", "Give text without halves of surrogate pairs."
            )
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise UsageError(f"the prompt {prompt!r} is empty", "Give at least one token of text.")
    length = max(len(ids) for ids in encoded)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    tokens = [[1] * len(ids) for ids in encoded]

    def padded(row: list[int], fill: int) -> list[int]:
        filling = [fill] * (length - len(row))
        return filling + row if left else row + filling

    return {
        "input_ids": torch.tensor([padded(row, pad) for row in encoded], dtype=torch.int64),
        "attention_mask": torch.tensor([padded(row, 0) for row in tokens], dtype=torch.int64),
    }
