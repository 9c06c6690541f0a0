"""What a model says of itself when it runs on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.given_embeddings import takes_embeddings
from qeff_proxy.families.model_masks import record_masks
from qeff_proxy.flows.equality import TOLERANCES
from qeff_proxy.parts import Kind, MaskKind, MaskSpec
from torch import nn
from transformers import PreTrainedModel

__all__ = ["Probe", "encoder_of", "probe_model"]

_TOKENS, _PADDED = 5, 8  # of a text alone, and with padding
_LEAST_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Probe:
    """What a model was seen to do.

    Attributes:
        masks: The attention masks it creates with transformers' functions.
        width: Of the hidden states.
        positions: The most tokens of a text; ``None`` where nothing limits them.
        pads: Whether a text gives the same alone and with padding on its right. A Fourier
            transform or a convolution over the sequence sees the padding.
        padding: The padding token, where the model numbers it otherwise than other tokens: run on
            embeddings, it cannot know of it.
    """

    masks: tuple[MaskSpec, ...]
    width: int
    positions: int | None
    pads: bool
    padding: int | None = None

    def settings(self, kind: Kind) -> dict[str, Any]:
        """What a flow has to know of it, of a proxy of this kind."""
        return {
            "max_length": self.positions,
            "positions": self.positions,
            "pads": self.pads,
            "padding": self.padding if kind == "split" else None,
        }


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that embeds: of an encoder and a decoder the encoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def probe_model(model: PreTrainedModel) -> Probe:
    """Run a model on one text, alone and padded.

    Raises:
        UnsupportedModelError: It cannot be run on token ids, or gives no hidden state for each.
    """
    encoder = encoder_of(model)
    table = encoder.get_input_embeddings()
    pad = getattr(table, "padding_idx", None)
    allowed = [row for row in range(table.weight.shape[0]) if row != pad]
    order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(allowed)[order][None, :_TOKENS].to(table.weight.device)
    padding = (0, _PADDED - ids.shape[1])
    padded = nn.functional.pad(ids, padding, value=pad or 0)
    seen = nn.functional.pad(torch.ones_like(ids), padding)
    takes_mask = "attention_mask" in inspect.signature(encoder.forward).parameters
    masks: dict[MaskKind, MaskSpec] = {}
    limits: list[int] = []
    try:
        # Some create no mask where they are given none.
        known = {"attention_mask": seen} if takes_mask else {}
        with torch.no_grad(), record_masks(encoder, masks):
            with _positions_limited(encoder, ids.shape[1], limits):
                alone = encoder(input_ids=ids)[0]
            longer = encoder(input_ids=padded, **known)[0]
            padding_token = _numbered_padding(encoder, ids, pad)
    except Exception as error:  # whatever a model's code raises on inputs it is not made for
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on token ids alone: {type(error).__name__}: "
            f"{first_line(error)}",
            "Only models that give hidden states for the tokens of a text are embedding models.",
        ) from error
    if alone.dim() != 3 or alone.shape[1] != ids.shape[1]:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {list(alone.shape)} for {ids.shape[1]} tokens",
            "Only models that give a hidden state for each token are embedding models.",
        )
    tolerance = max(_LEAST_TOLERANCE, TOLERANCES.get(dtype_name(model.dtype), 0))
    apart = (longer[:, : ids.shape[1]] - alone).abs().max()
    positions = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    if limits or not isinstance(positions, int) or positions <= 0:
        positions = min(limits, default=None)
    # Written so that a NaN is a difference.
    pads = bool(apart <= tolerance * alone.abs().max())
    return Probe(tuple(masks.values()), int(alone.shape[-1]), positions, pads, padding_token)


def _numbered_padding(encoder: PreTrainedModel, ids: torch.Tensor, pad: int | None) -> int | None:
    """The padding token, if ids that have it give other hidden states than their embeddings."""
    if pad is None or not takes_embeddings(encoder):
        return None
    ids = ids.clone()
    ids[:, 1] = pad
    inner = encoder(input_ids=ids)[0]
    embedded = encoder(inputs_embeds=encoder.get_input_embeddings()(ids))[0]
    differ = (inner - embedded).abs().max() > _LEAST_TOLERANCE * inner.abs().max()
    return pad if differ else None


@contextmanager
def _positions_limited(encoder: nn.Module, length: int, limits: list[int]) -> Iterator[None]:
    """Note how many tokens each table of positions has rows for, while the context is open.

    Families begin to count at different rows: RoBERTa behind that of the padding token.
    """

    def note(table: nn.Embedding, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten() if args and isinstance(args[0], torch.Tensor) else None
        if rows is None or rows.numel() != length or rows.is_meta or rows.is_floating_point():
            return
        if bool((rows.diff() == 1).all()):
            limits.append(table.num_embeddings - int(rows[0]))

    with ExitStack() as stack:
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                handle = module.register_forward_pre_hook(note)
                stack.callback(partial(handle.remove))
        yield
