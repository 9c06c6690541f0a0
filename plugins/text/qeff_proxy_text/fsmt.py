"""FSMT: encoder and decoder are plain modules, and the decoder holds the head.

Adapted to the calls of other encoder-decoders, the generic way serves. The decoder runs on token
ids that stand for the embeddings it is given: on embeddings, it forgets how many are cached.
Padding among its own ids has no position, and embeddings do not show it (``unplaced_token``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.sites import Site
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from qeff_proxy_text import seq2seq
from qeff_proxy_text.seq2seq import decode, preprocess

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

create_causal_mask = masking_utils.create_causal_mask
create_bidirectional_mask = masking_utils.create_bidirectional_mask


@hookimpl
def locate_embedding() -> Site:
    """The decoder's token embedding."""
    return Site("model.decoder.embed_tokens")


@hookimpl
def locate_lm_head() -> Site:
    """The decoder's last module, tied to its embedding."""
    return Site("model.decoder.output_projection")


@hookimpl
def build_proxy(model: PreTrainedModel, kind: Kind) -> Proxy | None:
    """As of other encoder-decoders."""
    ends = Site("decoder.inner.embed_tokens"), Site("head")
    proxy = seq2seq.build_proxy(_Adapted(model), *ends, kind)
    settings = {"unplaced_token": model.config.pad_token_id}
    return proxy and replace(proxy, settings={**proxy.settings, **settings})


class _Adapted(PreTrainedModel):  # type: ignore[misc]
    """The model with its head beside the decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config)
        self.encoder = _Encoder(model.model.encoder, model.config)
        self.head = model.model.decoder.output_projection
        headless = replace_modules(model.model.decoder, {"output_projection": nn.Identity()})
        self.decoder = _Decoder(headless, model.config)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.head
        return head

    def forward(self, decoder_inputs_embeds: torch.Tensor, **_: Any) -> Seq2SeqLMOutput:
        """The head alone: the decoder gives what it gets (`HeadPart`)."""
        hidden = self.decoder(inputs_embeds=decoder_inputs_embeds).last_hidden_state
        return Seq2SeqLMOutput(logits=self.head(hidden))


class _Inner(PreTrainedModel):  # type: ignore[misc]
    def __init__(self, inner: nn.Module, config: Any) -> None:
        super().__init__(config)
        self.inner = inner

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.inner.get_submodule("embed_tokens")


class _Encoder(_Inner):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """``[batch, sequence]`` or ``[batch, sequence, hidden]`` to hidden states."""
        return self.inner(input_ids, attention_mask, inputs_embeds)


class _Decoder(_Inner):
    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> BaseModelOutput:
        """``[batch, query]`` to hidden states, with transformers' masks in place of its own."""
        rows = encoder_hidden_states.new_zeros(*input_ids.shape, 1)
        own = create_causal_mask(self.config, rows, attention_mask, past_key_values=past_key_values)
        cross = create_bidirectional_mask(
            self.config, rows, encoder_attention_mask, encoder_hidden_states
        )
        seen = None if cross is None else (cross[:, 0, 0] == 0).long()
        return self.inner(
            input_ids, encoder_hidden_states, seen, None, own, None, past_key_values, use_cache
        )
