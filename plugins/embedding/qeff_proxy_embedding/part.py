"""The module of an embedding model's body, or of the whole model, with pooling."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.families.given_embeddings import embeddings_given, needs_given
from qeff_proxy.families.model_masks import provide_masks
from qeff_proxy.families.rotary import rotary_by_length
from qeff_proxy.families.window_attention import with_open_windows
from qeff_proxy.parts import MaskKind, MaskSpec, Part, TensorSpec
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_embedding.probe import encoder_of

if TYPE_CHECKING:
    from qeff_proxy_embedding.pooling import Pooling
    from qeff_proxy_embedding.sentence_folder import DenseLayers

__all__ = ["EncoderPart"]


class EncoderPart(nn.Module):
    """A model that runs once, with plain tensors as masks, and pooling.

    The model counts positions from the start of the row, so rows are padded on the right.

    Args:
        model: The base model, uncut: with embeddings as input it does not use its token embedding.
        masks: The attention masks it creates (`qeff_proxy_embedding.probe`).
        pooling: How the hidden states are pooled.
        entry: The name of the first input, ``"inputs_embeds"`` or ``"input_ids"``.
        dense: Layers between pooling and normalization, where the checkpoint has them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        masks: tuple[MaskSpec, ...],
        pooling: Pooling,
        entry: str,
        dense: DenseLayers | None = None,
    ) -> None:
        super().__init__()
        encoder, self.reach = with_open_windows(encoder_of(model))
        self.model = experts_in_turn(rotary_by_length(encoder))
        self.masks = masks
        self.pooling = pooling
        self.entry = entry
        self.dense = dense
        parameters = inspect.signature(self.model.forward).parameters
        self.needs_given = needs_given(self.model)
        self.takes_mask = "attention_mask" in parameters
        # XLM takes token types, too, and looks them up in its token embedding.
        kinds = getattr(model.config, "type_vocab_size", 0) or 0
        self.takes_token_types = "token_type_ids" in parameters and kinds > 1
        self.takes_cache = "use_cache" in parameters

    def inputs(self, first: TensorSpec) -> tuple[TensorSpec, ...]:
        """``first`` and the other inputs: masks, token types, and the padding mask for pooling."""
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
        """The output; ``width`` is that of the hidden states."""
        dtype = dtype_name(self.model.dtype)
        if not self.pooling.pools:
            return TensorSpec("last_hidden_state", dtype, ("batch", "sequence", width))
        return TensorSpec("sentence_embedding", dtype, ("batch", self._vector_width(width)))

    def as_part(
        self, name: Literal["body", "model"], first: TensorSpec, output: TensorSpec
    ) -> Part:
        """It as a part of a proxy, traced at several blocks of a window if it has windows."""
        sizes = {"sequence": 3 * self.reach} if self.reach else {}
        inputs = self.inputs(first)
        return Part(name, self, inputs, (output,), name, self.masks, trace_sizes=sizes)

    def _vector_width(self, width: int) -> int:
        if self.pooling.function is None:
            width = width * self.pooling.parts if self.dense is None else self.dense.width
            return self.pooling.truncate_dim or width
        hidden = torch.zeros(1, 2, width, dtype=self.model.dtype)
        hint = "It must turn [batch, sequence, hidden] and [batch, sequence] into [batch, width]."
        try:
            vector = self.pooling(hidden, torch.ones(1, 2, dtype=torch.int64))
        except Exception as error:
            raise UsageError(
                f"the pooling {self.pooling.name} fails: {type(error).__name__}: {error}", hint
            ) from error
        if not isinstance(vector, torch.Tensor) or vector.dim() != 2 or vector.shape[0] != 1:
            shape = list(getattr(vector, "shape", ()))
            raise UsageError(
                f"the pooling {self.pooling.name} gives {type_named(vector)} of shape {shape} "
                "for one text",
                hint,
            )
        return int(vector.shape[-1])

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model and pool.

        Args:
            tensors: ``entry``, the masks ``[batch, 1, sequence, sequence]``, ``token_type_ids``
                and ``padding_mask`` (1 for a token), both ``[batch, sequence]`` int64.

        Returns:
            ``sentence_embedding [batch, width]``, or ``last_hidden_state [batch, sequence,
            hidden]`` without pooling.
        """
        masks: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: tensors[mask.name] for mask in self.masks
        }
        padding_mask = tensors["padding_mask"]
        arguments: dict[str, Any] = {}
        if self.takes_mask:
            arguments["attention_mask"] = padding_mask
        if self.takes_token_types:
            arguments["token_type_ids"] = tensors["token_type_ids"]
        if self.takes_cache:
            arguments["use_cache"] = False
        name = self.entry
        given: AbstractContextManager[torch.Tensor] = nullcontext(tensors[name])
        if self.needs_given:
            name, given = "input_ids", embeddings_given(tensors[name])
        with provide_masks(self.model, masks), given as first:
            hidden = self.model(**{name: first}, **arguments)[0]
        name = "sentence_embedding" if self.pooling.pools else "last_hidden_state"
        return {name: self.pooling(hidden, padding_mask, self.dense)}
