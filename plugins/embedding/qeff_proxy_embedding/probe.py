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
from qeff_proxy.common.messages import first_line, type_named
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.given_embeddings import (
    on_embeddings,
    takes_embeddings,
    with_given_embeddings,
)
from qeff_proxy.families.model_masks import record_masks
from qeff_proxy.flows.equality import TOLERANCES
from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.parts import Kind, MaskKind, MaskSpec
from torch import nn
from transformers import PreTrainedModel

__all__ = ["Probe", "encoder_of", "has_decoder", "probe_model"]

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
        embeds: Whether it gives the same on its embeddings as on their tokens.
        padding: The padding token, where the model numbers it otherwise than other tokens: run on
            embeddings, it cannot know of it.
        masking: The token that hides another, where the model does something else there.
    """

    masks: tuple[MaskSpec, ...]
    width: int
    positions: int | None
    pads: bool
    embeds: bool = True
    padding: int | None = None
    masking: int | None = None

    def without_table(self, model: ModuleT, table: nn.Module) -> ModuleT:
        """The model, to be run on embeddings."""
        return model if self.embeds else with_given_embeddings(model, table)

    def settings(self, kind: Kind) -> dict[str, Any]:
        """What a flow has to know of it, of a proxy of this kind."""
        return {
            "max_length": self.positions,
            "positions": self.positions,
            "pads": self.pads,
            "padding": self.padding if kind == "split" else None,
            "masking": self.masking if kind == "split" else None,
        }


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that embeds: of an encoder and a decoder the encoder."""
    return model.get_encoder() if has_decoder(model) else model


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether a model has a decoder beside its encoder; some heads have the encoder alone."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def probe_model(model: PreTrainedModel) -> Probe:
    """Run a model on one text, alone and padded.

    Raises:
        UnsupportedModelError: It cannot be run on token ids, or gives no hidden state for each.
    """
    encoder = encoder_of(model)
    table = encoder.get_input_embeddings()
    pad = getattr(table, "padding_idx", None)
    mask = getattr(encoder.config.get_text_config(), "mask_token_id", None)
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
            embeds, apart = _on_embeddings(encoder, ids, (pad, mask))
    except UnsupportedModelError:
        raise
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
    off = (longer[:, : ids.shape[1]] - alone).abs().max()
    positions = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    if limits or not isinstance(positions, int) or positions <= 0:
        positions = min(limits, default=None)
    # Written so that a NaN is a difference.
    pads = bool(off <= tolerance * alone.abs().max())
    return Probe(tuple(masks.values()), int(alone.shape[-1]), positions, pads, embeds, *apart)


def _on_embeddings(
    encoder: PreTrainedModel, ids: torch.Tensor, special: tuple[int | None, int | None]
) -> tuple[bool, list[int | None]]:
    """What an encoder does on the embeddings of tokens.

    Returns:
        Whether it gives what it gives on the tokens; those of the special ones where no run on
        embeddings does.

    Raises:
        UnsupportedModelError: Its table gives something else than embeddings.
    """
    table = encoder.get_input_embeddings()
    rows = ids.repeat(1 + len(special), 1)
    for row, token in enumerate(special, start=1):
        if isinstance(token, int) and 0 <= token < table.weight.shape[0]:
            rows[row, 1] = token
    embeddings = table(rows)
    if not isinstance(embeddings, torch.Tensor):
        raise UnsupportedModelError(
            f"the token embedding of {type(encoder).__name__} gives {type_named(embeddings)}, not "
            "embeddings alone",
            "A plugin for this model type can cut it elsewhere.",
        )
    expected = encoder(input_ids=rows)[0]
    largest = _LEAST_TOLERANCE * expected.abs().max()
    alike: list[bool] = [False]
    for embeds in (True, False) if takes_embeddings(encoder) else (False,):
        cut = encoder if embeds else with_given_embeddings(encoder, table)
        with on_embeddings(cut, embeddings) as first:
            alike = [bool(o <= largest) for o in (cut(**first)[0] - expected).abs().amax((1, 2))]
        if alike[0]:
            break
    return embeds, [None if same else t for t, same in zip(special, alike[1:], strict=True)]


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
