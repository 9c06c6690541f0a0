"""The modules an embedding model is cut into: token table, body with pooling, and the whole."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError
from qeff_proxy.families.model_masks import provide_masks, record_masks
from qeff_proxy.parts import MaskKind, MaskSpec, TensorSpec
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_proxy_embedding.pooling import Pooling

__all__ = ["EncoderPart", "probe_masks"]


def probe_masks(model: PreTrainedModel, hidden_size: int) -> tuple[MaskSpec, ...]:
    """Run ``model`` on two embeddings and see which attention masks it asks for."""
    masks: dict[MaskKind, MaskSpec] = {}
    device = next(model.parameters()).device
    embeddings = torch.zeros(1, 2, hidden_size, dtype=model.dtype, device=device)
    with torch.no_grad(), record_masks(model, masks):
        model(inputs_embeds=embeddings)
    return tuple(masks.values())


class EncoderPart(nn.Module):
    """A model that runs once, with its masks as plain tensors and its pooling.

    Positions are the model's own: they count from the row's first token, which is why rows are
    padded on the right.

    Args:
        model: The base model, uncut: given embeddings, it leaves its token table alone.
        masks: What `probe_masks` found.
        pooling: What follows.
        entry: The name of its first input, ``"inputs_embeds"`` or ``"input_ids"``.
    """

    def __init__(
        self, model: PreTrainedModel, masks: tuple[MaskSpec, ...], pooling: Pooling, entry: str
    ) -> None:
        super().__init__()
        self.model = model
        self.masks = masks
        self.pooling = pooling
        self.entry = entry
        parameters = inspect.signature(model.forward).parameters
        self.takes_token_types = "token_type_ids" in parameters
        self.takes_cache = "use_cache" in parameters

    def inputs(self, first: TensorSpec) -> tuple[TensorSpec, ...]:
        """What it takes besides ``first``: masks, token types, and the padding to pool over."""
        dtype = dtype_name(self.model.dtype)
        ids = ("batch", "sequence")
        names = [TensorSpec("token_type_ids", "int64", ids)] if self.takes_token_types else []
        shape = ("batch", 1, "sequence", "sequence")
        return (
            first,
            *(TensorSpec(mask.name, dtype, shape) for mask in self.masks),
            *names,
            TensorSpec("padding_mask", "int64", ids),
        )

    def output(self, width: int) -> TensorSpec:
        """What it gives; ``width`` is that of the hidden states."""
        dtype = dtype_name(self.model.dtype)
        if not self.pooling.pools:
            return TensorSpec("last_hidden_state", dtype, ("batch", "sequence", width))
        return TensorSpec("sentence_embedding", dtype, ("batch", self._vector_width(width)))

    def _vector_width(self, width: int) -> int:
        if self.pooling.function is None:
            return self.pooling.truncate_dim or width
        hidden = torch.zeros(1, 2, width, dtype=self.model.dtype)
        asked = "It is to make [batch, width] of [batch, sequence, hidden] and [batch, sequence]."
        try:
            vector = self.pooling(hidden, torch.ones(1, 2, dtype=torch.int64))
        except Exception as error:
            raise UsageError(
                f"the pooling {self.pooling.name} fails: {type(error).__name__}: {error}", asked
            ) from error
        if not isinstance(vector, torch.Tensor) or vector.dim() != 2 or vector.shape[0] != 1:
            shape = list(getattr(vector, "shape", ()))
            raise UsageError(
                f"the pooling {self.pooling.name} gives {type_named(vector)} of shape {shape} "
                "for one text",
                asked,
            )
        return int(vector.shape[-1])

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model and pool.

        Args:
            tensors: ``entry``, the masks ``[batch, 1, sequence, sequence]``, ``token_type_ids``
                and ``padding_mask`` (1 for a token), both ``[batch, sequence]`` int64.

        Returns:
            ``sentence_embedding [batch, width]``, or ``last_hidden_state [batch, sequence,
            hidden]`` where nothing pools.
        """
        given: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: tensors[mask.name] for mask in self.masks
        }
        padding_mask = tensors["padding_mask"]
        arguments: dict[str, Any] = {
            self.entry: tensors[self.entry],
            "attention_mask": padding_mask,
        }
        if self.takes_token_types:
            arguments["token_type_ids"] = tensors["token_type_ids"]
        if self.takes_cache:
            arguments["use_cache"] = False
        with provide_masks(self.model, given):
            hidden = self.model(**arguments).last_hidden_state
        name = "sentence_embedding" if self.pooling.pools else "last_hidden_state"
        return {name: self.pooling(hidden, padding_mask)}
