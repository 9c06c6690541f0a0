"""The modules Whisper is cut into: the encoder with the cross keys, and the decoder's body."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from qeff_proxy.families.model_cache import cache_argument
from qeff_proxy.families.model_masks import provide_masks
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

__all__ = ["CrossKeysPart", "DecoderBody"]


class CrossKeysPart(nn.Module):
    """``input_features`` to the keys and values of every layer's cross attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = model.model.encoder
        self.heads = int(model.config.decoder_attention_heads)
        self.cross = nn.ModuleList(
            _CrossKeys(layer.encoder_attn, self.heads) for layer in model.model.decoder.layers
        )

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, mel, frames]`` to ``[batch, heads, positions, width]`` each."""
        hidden = self.encoder(input_features).last_hidden_state
        result = {}
        for index, cross in enumerate(self.cross):
            keys, values = cross(hidden)
            result[f"cross_key_values.{index}.key"] = keys
            result[f"cross_key_values.{index}.value"] = values
        return result


class _CrossKeys(nn.Module):
    """The keys and values of one layer."""

    def __init__(self, attention: Any, heads: int) -> None:
        super().__init__()
        self.keys = attention.k_proj
        self.values = attention.v_proj
        self.heads = heads

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split(self.keys(hidden)), self._split(self.values(hidden))

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        batch, positions, width = states.shape
        return states.view(batch, positions, self.heads, width // self.heads).transpose(1, 2)


class DecoderBody(nn.Module):
    """The decoder with its mask, positions and both caches as plain tensors.

    Args:
        model: The uncut model.
        table: The embedding of ``input_ids``, or ``None`` if the input is embeddings.
        head: The module from hidden states to logits, or ``None`` if the output is hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, table: nn.Module | None, head: nn.Module | None
    ) -> None:
        super().__init__()
        self.decoder = model.model.decoder
        self.table = table
        self.head = head

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the decoder.

        Args:
            tensors: ``inputs_embeds`` or ``input_ids``, ``attention_mask [batch, 1, query,
                past + query]``, ``position_ids [batch, query]`` int64, and the caches, dots as
                double underscores.

        Returns:
            ``last_hidden_state`` or ``logits``, and the cache with the new positions.
        """
        embeds = (
            tensors["inputs_embeds"] if self.table is None else self.table(tensors["input_ids"])
        )
        cross = self._cache(tensors, "cross_key_values")
        cache = EncoderDecoderCache(self._cache(tensors, "past_key_values"), cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        with provide_masks(self.decoder, {"causal": tensors["attention_mask"]}):
            outputs = self.decoder(
                inputs_embeds=embeds,
                position_ids=tensors["position_ids"],
                # Only makes the layers attend; the keys and values are in the cache.
                encoder_hidden_states=embeds,
                use_cache=True,
                **{cache_argument(self.decoder.forward): cache},
            )
        hidden = outputs.last_hidden_state
        result = {"last_hidden_state": hidden}
        if self.head is not None:
            result = {"logits": self.head(hidden)}
        for index, layer in enumerate(cache.self_attention_cache.layers):
            result[f"present.{index}.key"] = layer.keys
            result[f"present.{index}.value"] = layer.values
        return result

    def _cache(self, tensors: dict[str, torch.Tensor], prefix: str) -> DynamicCache:
        cache = DynamicCache()
        for index in itertools.count():
            if f"{prefix}__{index}__key" not in tensors:
                break
            layer = DynamicLayer()
            keys = tensors[f"{prefix}__{index}__key"]
            values = tensors[f"{prefix}__{index}__value"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache
