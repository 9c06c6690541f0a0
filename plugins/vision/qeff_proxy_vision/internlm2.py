"""InternLM2 from the code of InternVL's checkpoints (InternVL 2.5 2B, 8B and 26B)."""

from __future__ import annotations

from typing import Any

import torch
from qeff_proxy.parts import Proxy
from torch import nn

from qeff_proxy_vision.own_code import PairsBody, language_parts

__all__ = ["ARCHITECTURE", "build_language_parts", "fill_rotary_tables"]

ARCHITECTURE = "InternLM2ForCausalLM"


def build_language_parts(model: Any) -> Proxy:
    """The three parts of an ``InternLM2ForCausalLM``."""
    config, inner = model.config, model.model
    body = PairsBody(inner.layers, inner.norm, "past_key_value", "attention_mask")
    heads = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    return language_parts(inner.tok_embeddings, body, model.output, heads)


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
