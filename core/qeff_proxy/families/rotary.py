"""Rotary embeddings that cannot be traced as they are.

Frequencies that depend on the length are computed anew at each step (`rotary_by_length`).

With dynamic NTK, transformers keeps the frequencies of the longest run so far in the module, and
decides by a comparison in Python whether to compute others; neither can be traced. For a run from
its beginning, computing them for the positions at hand gives the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.layers.replace_modules import replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The setting that says beyond which position LongRoPE changes its factors.
LONGROPE_LIMIT = "original_max_position_embeddings"
_DYNAMIC = "dynamic"


def rotary_limits(config: PreTrainedConfig) -> Iterator[tuple[dict[str, Any], int]]:
    """The settings of each rotary embedding with other factors for longer runs, and from where.

    LongRoPE changes its factors once, beyond ``original_max_position_embeddings``; dynamic NTK for
    each length beyond the model's limit. Settings may be given for each type of layer.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    for rope in (settings, *settings.values()):
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind == "longrope" and isinstance(rope.get(LONGROPE_LIMIT), int):
            yield rope, rope[LONGROPE_LIMIT]
        elif kind == _DYNAMIC:
            yield rope, config.max_position_embeddings


class _DynamicRotary(nn.Module):
    """A rotary embedding without the frequencies of earlier runs."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Cosines and sines ``[batch, query, width]`` for the longest row of ``position_ids``."""
        compute = ROPE_INIT_FUNCTIONS[_DYNAMIC]
        frequencies, scaling = compute(self.rotary.config, x.device, seq_len=position_ids.max() + 1)
        fresh = SimpleNamespace(inv_freq=frequencies, attention_scaling=scaling)
        return inspect.unwrap(type(self.rotary).forward)(fresh, x, position_ids)


def rotary_by_length(decoder: ModuleT) -> ModuleT:
    """``decoder``, or a copy of it whose rotary embeddings keep no frequencies."""
    dynamic = {
        path: _DynamicRotary(module)
        for path, module in decoder.named_modules()
        if getattr(module, "rope_type", None) == _DYNAMIC
        and hasattr(type(module).forward, "__wrapped__")
    }
    return replace_modules(decoder, dynamic) if dynamic else decoder
