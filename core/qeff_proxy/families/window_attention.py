"""Attention to windows of tokens, in blocks of a number of positions that a graph leaves open.

Encoders with windows (LED, Longformer) pad a text to whole windows and divide it into chunks, whose
number a trace would freeze. `with_open_windows` replaces such attention.

All tokens attend locally, as in transformers without a ``global_attention_mask``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.layers.replace_modules import replace_modules

__all__ = ["with_open_windows"]

_REACH, _PADDING = "one_sided_attn_window_size", "_pad_to_window_size"


def with_open_windows(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """The model with such attention replaced; else the model itself.

    Returns:
        The model, and how many positions away its farthest window reaches, 0 where it has none.
    """
    attention = {
        path: _WindowAttention(module)
        for path, module in model.named_modules()
        if hasattr(module, _REACH) and hasattr(module, "query_global")
    }
    if not attention:
        return model, 0
    padding = [path for path, module in model.named_modules() if hasattr(module, _PADDING)]
    copied = replace_modules(model, attention)
    for path in padding:
        vars(copied.get_submodule(path))[_PADDING] = _not_padded
    return copied, max(module.reach for module in attention.values())


def _not_padded(**given: Any) -> tuple[Any, ...]:
    """What a model's method of this name returns for a text of whole windows."""
    return (0, *(value for name, value in given.items() if name != "pad_token_id"))


class _WindowAttention(nn.Module):
    """Attention to the keys that are at most half a window away."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.heads, self.reach = attention.num_heads, getattr(attention, _REACH)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        is_global_attn: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        """``[batch, sequence, hidden]``, and ``[batch, sequence]``, which is 0 for a token.

        Raises:
            UnsupportedModelError: Some tokens attend globally.
        """
        if is_global_attn is True:  # in a trace it is a symbol
            raise UnsupportedModelError(
                "the model lets some tokens attend to all others, not to a window alone",
                "Models whose tokens all attend locally are exported.",
            )
        batch, length, width = hidden_states.shape
        blocks = (length + self.reach - 1) // self.reach

        def divided(states: torch.Tensor, heads: int) -> torch.Tensor:
            """``[batch, heads, blocks, positions of a block, width of a head]``."""
            whole = pad(states, (0, 0, 0, blocks * self.reach - length))
            return whole.view(batch, blocks, self.reach, heads, -1).permute(0, 3, 1, 2, 4)

        def near(states: torch.Tensor, heads: int) -> torch.Tensor:
            """The same, with the positions of the blocks before and after."""
            around = pad(divided(states, heads), (0, 0, 0, 0, 1, 1))
            return torch.cat((around[:, :, :-2], around[:, :, 1:-1], around[:, :, 2:]), 3)

        queries = divided(self.query(hidden_states), self.heads)
        keys = near(self.key(hidden_states), self.heads).transpose(3, 4)
        scores = queries @ keys / (width // self.heads) ** 0.5
        tokens = near((attention_mask == 0).to(scores.dtype)[..., None], 1).transpose(3, 4)
        reached = scores.new_ones(self.reach, 3 * self.reach).triu().tril(2 * self.reach)
        scores = scores.masked_fill(tokens * reached == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        output = weights @ near(self.value(hidden_states), self.heads)
        return (output.permute(0, 2, 3, 1, 4).reshape(batch, -1, width)[:, :length],)
