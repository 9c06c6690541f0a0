"""Language models of checkpoints' own code, from before transformers' caches, cut into three parts.

Their layers take the keys and values of past tokens as a pair, and give back the longer pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, dtype_name, to_array, to_tensor
from qeff_proxy.families.decoder import EmbeddingPart
from qeff_proxy.families.decoder_cache import attention_cache
from qeff_proxy.families.decoder_layout import DecoderLayout
from qeff_proxy.families.model_cache import cache_of
from qeff_proxy.flows.causal_engine import position_ids_of
from qeff_proxy.parts import MaskSpec, Part, Proxy, TensorSpec
from torch import nn

from qeff_proxy_vision.proxy import FLOW

__all__ = ["PairsBody", "language_parts", "stepped_logits"]


class PairsBody(nn.Module):
    """The layers and the last norm, with the mask and the cache as plain tensors.

    Args:
        layers: The layers.
        norm: The last norm.
        past: The layers' argument for the pair of past keys and values.
        mask: The layers' argument for the mask, if they take it.
        scale: The embeddings are multiplied by it.
    """

    def __init__(
        self, layers: Any, norm: Any, past: str, mask: str | None, scale: float | None = None
    ) -> None:
        super().__init__()
        self.layers: Any = layers
        self.norm: Any = norm
        self.past, self.mask = past, mask
        self.scale = scale

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Like `qeff_proxy.families.decoder.DecoderPart.forward`."""
        hidden = tensors["inputs_embeds"]
        if self.scale is not None:
            hidden = hidden * self.scale
        given: dict[str, Any] = {"position_ids": tensors["position_ids"], "use_cache": True}
        if self.mask is not None:
            given[self.mask] = tensors["attention_mask"]
        present = {}
        for index, layer in enumerate(self.layers):
            names = (f"past_key_values__{index}__{side}" for side in ("key", "value"))
            given[self.past] = tuple(tensors[name] for name in names)
            hidden, (keys, values) = layer(hidden, **given)
            present[f"present.{index}.key"] = keys
            present[f"present.{index}.value"] = values
        return {"last_hidden_state": self.norm(hidden), **present}


class _Head(nn.Module):
    """The output layer, and the scale of the logits if the model has one."""

    def __init__(self, head: nn.Module, scale: float | None) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, sequence, hidden]`` to ``logits [batch, sequence, vocabulary]``."""
        logits = self.head(last_hidden_state)
        return {"logits": logits if self.scale is None else logits * self.scale}


def language_parts(
    embedding: nn.Module,
    body: PairsBody,
    head: nn.Linear,
    heads: tuple[int, int],
    scale: float | None = None,
) -> Proxy:
    """The proxy of a language model, from three modules.

    Args:
        embedding: ``input_ids`` to embeddings.
        body: Its layers.
        head: Hidden states to logits.
        heads: The number of heads with keys and values, and the width of each.
        scale: The logits are multiplied by it.
    """
    vocabulary, width = head.weight.shape
    dtype = dtype_name(head.weight.dtype)
    layers = (attention_cache(*heads, dtype),) * len(body.layers)
    layout = DecoderLayout(layers, (MaskSpec("attention_mask", "causal"),))
    ids = TensorSpec("input_ids", "int64", ("batch", "query"))
    embeddings = TensorSpec("inputs_embeds", dtype, ("batch", "query", width))
    hidden = TensorSpec("last_hidden_state", dtype, ("batch", "query", width))
    logits = TensorSpec("logits", dtype, ("batch", "query", vocabulary))
    inputs = (embeddings, *layout.host_inputs(dtype))
    outputs = (hidden, *layout.cache_outputs())
    parts = (
        Part("embedding", EmbeddingPart(embedding), (ids,), (embeddings,), "vocabulary"),
        Part("body", body, inputs, outputs, "body", layout.masks),
        Part("lm_head", _Head(head, scale), (hidden,), (logits,), "vocabulary"),
    )
    return Proxy("split", FLOW, parts, {"vocabulary": vocabulary, "hidden_size": width})


def stepped_logits(
    first: Callable[..., Any],
    others: Callable[..., Any],
    tensors: Mapping[str, Array],
    new: Array,
) -> Array:
    """As `qeff_proxy_vision.reference.model_logits`, by a model that makes its first cache itself.

    Args:
        first: Runs the model on the prompt.
        others: Runs it on each next token.
        tensors: The processor's output.
        new: ``[batch, steps]`` int64: the next tokens.
    """
    pieces: list[Array] = []
    cache = None
    for step in range(new.shape[1] + 1):
        seen = np.concatenate([tensors["attention_mask"], np.ones_like(new[:, :step])], axis=1)
        ids = new[:, step - 1 : step] if step else tensors["input_ids"]
        with torch.no_grad():
            outputs = (others if step else first)(
                # A copy: some code adds features to what is looked up, in place.
                input_ids=to_tensor(ids.copy()),
                attention_mask=to_tensor(seen),
                position_ids=to_tensor(position_ids_of(seen, ids.shape[1])),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
        cache = cache_of(outputs)
        pieces.append(to_array(outputs.logits.float()))
    return np.concatenate(pieces, axis=1)
