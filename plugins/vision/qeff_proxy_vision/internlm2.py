"""InternLM2 from the code of InternVL's checkpoints (InternVL 2.5 2B, 8B and 26B).

Its cache is a tuple of keys and values for each layer, which current transformers does not support.
"""

from __future__ import annotations

from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.families.decoder_cache import attention_cache
from qeff_proxy.families.decoder_layout import DecoderLayout
from qeff_proxy.parts import MaskSpec, Proxy
from torch import nn

from qeff_proxy_vision.proxy import language_proxy

__all__ = ["ARCHITECTURE", "build_language_parts", "fill_rotary_tables"]

ARCHITECTURE = "InternLM2ForCausalLM"


class _Body(nn.Module):
    """The layers and the last norm, with the mask and the cache as plain tensors.

    Args:
        model: The model with ``layers`` and ``norm``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: Any = model.layers
        self.norm: Any = model.norm

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `qeff_proxy.families.decoder.DecoderPart.forward`."""
        hidden = tensors["inputs_embeds"]
        present = {}
        for index, layer in enumerate(self.layers):
            hidden, (keys, values) = layer(
                hidden,
                attention_mask=tensors["attention_mask"],
                position_ids=tensors["position_ids"],
                past_key_value=tuple(
                    tensors[f"past_key_values__{index}__{side}"] for side in ("key", "value")
                ),
                use_cache=True,
            )
            present[f"present.{index}.key"] = keys
            present[f"present.{index}.value"] = values
        return {"last_hidden_state": self.norm(hidden), **present}


class _Head(nn.Module):
    """The output layer."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, sequence, hidden]`` to ``logits [batch, sequence, vocabulary]``."""
        return {"logits": self.head(last_hidden_state)}


def build_language_parts(model: Any) -> Proxy:
    """The three parts of an ``InternLM2ForCausalLM``."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    layer = attention_cache(heads, width, dtype_name(model.dtype))
    mask = MaskSpec("attention_mask", "causal")
    return language_proxy(
        model.model.tok_embeddings,
        _Body(model.model),
        _Head(model.output),
        DecoderLayout((layer,) * config.num_hidden_layers, (mask,)),
        (config.hidden_size, model.output.weight.shape[0]),
        dtype_name(model.dtype),
    )


def fill_rotary_tables(model: nn.Module) -> None:
    """Compute the rotary tables: they are not weights, so loading leaves them empty."""
    for module in model.modules():
        fill: Any = getattr(module, "_set_cos_sin_cache", None)
        if fill is None or not hasattr(module, "inv_freq"):
            continue
        rotary: Any = module
        exponents = torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim
        rotary.inv_freq = 1.0 / rotary.base**exponents
        fill(
            seq_len=rotary.max_position_embeddings,
            device=rotary.inv_freq.device,
            dtype=torch.get_default_dtype(),
        )
