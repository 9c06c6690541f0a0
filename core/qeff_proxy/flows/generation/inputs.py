"""Check the token ids and the mask that generation starts from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UsageError


def checked_ids(
    tensors: Mapping[str, torch.Tensor], rows: int | None = None, name: str = "input_ids"
) -> torch.Tensor:
    """The token ids of a run, ``[batch, sequence]`` int64.

    Args:
        tensors: The inputs, from the ``preprocess`` hook.
        rows: The number of tokens of the model; ``None`` where it is unknown.
        name: The name of the ids among the inputs.

    Raises:
        UsageError: There are none, or they are not tokens of the model.
    """
    ids = tensors.get(name)
    if ids is None:
        raise UsageError(
            f"the inputs are {', '.join(tensors) or 'none'}", f"Token ids go by {name}."
        )
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise UsageError(
            f"{name} has shape {list(ids.shape)}", "Give [batch, sequence], neither zero."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = dtype_name(ids.dtype)
        raise UsageError(f"{name} are {kind}", "Token ids are whole numbers.")
    ids = ids.to(torch.int64)
    wrong = ids[ids < 0 if rows is None else (ids < 0) | (ids >= rows)]
    if wrong.numel():
        known = "" if rows is None else f" to {rows - 1}"
        raise UsageError(
            f"{int(wrong[0])} is no token of this model",
            f"Its token ids go from 0{known}. Use its own tokenizer; if that has added tokens, "
            "resize the model's embedding (resize_token_embeddings).",
        )
    return ids


def checked_mask(
    tensors: Mapping[str, torch.Tensor], ids: torch.Tensor, *, left: bool = True
) -> torch.Tensor:
    """The attention mask of ``ids``, ``[batch, sequence]`` int64, 1 for a token; by default all 1.

    Args:
        tensors: The inputs, from the ``preprocess`` hook.
        ids: The token ids that it is for.
        left: Padding may be on the left only, as generation needs it of a decoder's prompt; else on
            the right only, as encoders do that count positions from the start of the row.

    Raises:
        UsageError: It has another shape or other values, or padding elsewhere.
    """
    mask = tensors.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise UsageError(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}",
            "They must be alike.",
        )
    # Compared before the conversion, so that 0.5 does not become 0; masks may be booleans.
    side, place, edge = ("left", "end", -1) if left else ("right", "begin", 0)
    if not ((mask == 0) | (mask == 1)).all() or not mask[:, edge].bool().all():
        raise UsageError(
            f"attention_mask must hold 0 and 1, and {place} with 1 in each row",
            f"Pad on the {side} (tokenizer.padding_side = '{side}'), as "
            + ("generation needs it." if left else "encoders need it."),
        )
    return mask.to(torch.int64)
