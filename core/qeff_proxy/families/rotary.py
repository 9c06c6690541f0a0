"""Rotary embeddings whose frequencies depend on the length, computed anew at each step.

With dynamic NTK, transformers keeps the frequencies of the longest run so far in the module, and
decides by a comparison in Python whether to compute others; neither can be traced. For a run from
its beginning, computing them for the positions at hand gives the same.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.layers.replace_modules import replace_modules

_DYNAMIC = "dynamic"


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
