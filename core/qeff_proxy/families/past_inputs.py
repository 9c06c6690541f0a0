"""Decoders whose cache is unknown, or that keep none: they are given all inputs again at each step.

In the place of keys and values stand the inputs so far, ``[batch, 1, past, width]``: as exact, but
a step takes as long as a prompt of that length. It holds where no position sees a later one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder_cache import CacheLayer
from qeff_proxy.parts import TensorSpec
from qeff_proxy.tensor_names import PAST_INPUTS

_LENGTHS = (5, 8, 300)  # some have other code for long texts
_CLOSE = 1e-3


def past_inputs(dtype: str, width: int) -> CacheLayer:
    """The inputs so far, of ``width`` numbers for each position: 1 for token ids."""
    return (TensorSpec(PAST_INPUTS, dtype, ("batch", 1, "past", width)),)


def lengthened(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The inputs so far and ``new``: ``[batch, query, width]``, or ids ``[batch, query]``."""
    return torch.cat([past[:, 0], new if new.dim() == 3 else new[..., None]], dim=1)


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def check_causal(decoder: Any, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Run a decoder over all positions at once, and see that none depends on a later one.

    Returns:
        Its output.

    Raises:
        UnsupportedModelError: It does not run, sees later positions, or loops over positions.
    """
    most = getattr(decoder.config, "max_position_embeddings", None) or -1  # so some say "any"
    # One less, since a slice of a whole table is no operation.
    lengths = [length if most < 0 else min(length, most - 1) for length in _LENGTHS]
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(2, lengths[-1], hidden_size, generator=generator)
    every = every.to(dtype=dtype, device=next(decoder.parameters()).device)
    outputs: list[torch.Tensor] = []
    counts = set()
    for length in lengths:
        try:
            with torch.no_grad(), OperationCounter() as counter:
                output: torch.Tensor = decoder(
                    inputs_embeds=every[:, :length].clone(), use_cache=False
                )[0]
        except Exception as error:  # whatever a model's code raises
            raise UnsupportedModelError(
                f"without a cache it does not run on {length} positions: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        if any(parameter.is_meta for parameter in decoder.parameters()):
            return output  # its first layers have been checked, with their weights
        outputs.append(output)
        counts.add(counter.count)
    for shorter, longer in pairwise(outputs):
        off = (longer[:, : shorter.shape[1]] - shorter).abs().max()
        if not off <= _CLOSE * shorter.abs().max():
            raise UnsupportedModelError("what it gives for a position changes with later ones")
    if len(counts) > 1:
        raise UnsupportedModelError(
            "it does something else for texts of other lengths, as a loop over positions does"
        )
    return outputs[0]
