"""LED: the encoder attends to windows, in blocks of a traced number of positions.

All tokens attend locally, as in transformers without a ``global_attention_mask``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.sites import Absent, Site
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.models.led.modeling_led import LEDEncoderSelfAttention

from qeff_proxy_text import seq2seq
from qeff_proxy_text.seq2seq import decode, locate_embedding, locate_lm_head, preprocess

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """As of other encoder-decoders."""
    attention = {
        path: _WindowAttention(module)
        for path, module in model.named_modules()
        if isinstance(module, LEDEncoderSelfAttention)
    }
    copied = replace_modules(model, attention)
    vars(copied.get_encoder())["_pad_to_window_size"] = _not_padded
    proxy = seq2seq.build_proxy(copied, embedding, lm_head, kind)
    if proxy is None:
        return None
    several = {"sequence": 3 * max(module.reach for module in attention.values())}  # blocks
    parts = (
        replace(part, trace_sizes=several) if part.name == "encoder" else part
        for part in proxy.parts
    )
    return replace(proxy, parts=tuple(parts))


def _not_padded(
    input_ids: Any, attention_mask: Any, inputs_embeds: Any, **_: Any
) -> tuple[int, Any, Any, Any]:
    """What the encoder's method of this name returns for a text of whole blocks."""
    return 0, input_ids, attention_mask, inputs_embeds


class _WindowAttention(nn.Module):
    """Attention to the keys that are at most half a window away."""

    def __init__(self, attention: LEDEncoderSelfAttention) -> None:
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.heads, self.reach = attention.num_heads, attention.one_sided_attn_window_size

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        """``[batch, sequence, hidden]``, and ``[batch, sequence]``, which is 0 for a token."""
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
