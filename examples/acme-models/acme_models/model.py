"""Acme: a small decoder, registered with transformers when this module is imported.

Attention and MLP run in parallel on the output of one norm. The token embedding has an unusual
name, and logits are capped. Acme Scaled multiplies the embeddings by a learned number.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

__all__ = ["AcmeConfig", "AcmeForCausalLM"]


class AcmeConfig(PreTrainedConfig):
    model_type = "acme"
    scaled = False

    def __init__(
        self,
        vocab_size=131,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        logit_cap=5.0,
        **rest,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.logit_cap = logit_cap
        super().__init__(**rest)


class AcmeScaledConfig(AcmeConfig):
    model_type = "acme-scaled"
    scaled = True

    def __init__(self, **values):
        super().__init__(**values)


class AcmeLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        width = config.hidden_size
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.norm = nn.LayerNorm(width)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, hidden, mask, cache):
        normed = self.norm(hidden)
        queries, keys, values = (
            projection(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return hidden + self.attention_out(mixed) + self.mlp(normed)


class AcmePreTrainedModel(PreTrainedModel):
    config_class = AcmeConfig
    base_model_prefix = "stack"


class AcmeModel(AcmePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(AcmeLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.scale = nn.Parameter(torch.ones(1)) if config.scaled else 1
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **_,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.words(input_ids) * self.scale
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + inputs_embeds.shape[1])[None]
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids
        )
        hidden = inputs_embeds + self.places(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask, past_key_values)
        return BaseModelOutputWithPast(self.norm(hidden), past_key_values if use_cache else None)


class AcmeForCausalLM(AcmePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.stack = AcmeModel(config)
        self.to_words = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **rest):
        outputs = self.stack(input_ids, attention_mask, position_ids, **rest)
        cap = self.config.logit_cap
        logits = torch.tanh(self.to_words(outputs[0]) / cap) * cap
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


class AcmeScaledForCausalLM(AcmeForCausalLM):
    config_class = AcmeScaledConfig


AutoConfig.register("acme", AcmeConfig)
AutoConfig.register("acme-scaled", AcmeScaledConfig)
AutoModelForCausalLM.register(AcmeConfig, AcmeForCausalLM)
AutoModelForCausalLM.register(AcmeScaledConfig, AcmeScaledForCausalLM)
