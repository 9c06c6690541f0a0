"""A language model with the module structure and habits of InternLM2's own code, for these tests.

Like that, it has queries, keys and values of a group side by side in one matrix, keeps its cache as
a tuple of tuples, takes its rotary tables from buffers that are no weights, and reads its mask from
a row for each query.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class InternLM2Config(PreTrainedConfig):
    model_type = "internlm2"


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings, base):
        super().__init__()
        self.dim, self.max_position_embeddings, self.base = dim, max_position_embeddings, base
        inv_freq = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._set_cos_sin_cache(max_position_embeddings, inv_freq.device, torch.float32)

    def _set_cos_sin_cache(self, seq_len, device, dtype):
        self.max_seq_len_cached = seq_len
        angles = torch.outer(torch.arange(seq_len, device=device).float(), self.inv_freq)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos_cached", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(dtype), persistent=False)

    def forward(self, x, seq_len):
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len, x.device, x.dtype)
        return self.cos_cached[:seq_len], self.sin_cached[:seq_len]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = RotaryEmbedding(
            self.width, config.max_position_embeddings, config.rope_theta
        )

    def forward(self, x, mask, position_ids, past):
        batch, length, _ = x.shape
        groups = self.heads // self.kv_heads
        qkv = self.wqkv(x).view(batch, length, self.kv_heads, groups + 2, self.width)
        q = qkv[..., :groups, :].reshape(batch, length, self.heads, self.width).transpose(1, 2)
        k, v = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        total = length + (past[0].shape[-2] if past is not None else 0)
        cos, sin = (table[position_ids][:, None] for table in self.rotary_emb(v, total))

        def turned(y):
            left, right = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-right, left], dim=-1) * sin

        q, k = turned(q), turned(k)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ keys.transpose(2, 3) / self.width**0.5 + mask
        out = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, length, -1)
        return self.wo(out), (k, v)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.ffn_norm = nn.RMSNorm(config.hidden_size)

    def forward(self, x, attention_mask=None, position_ids=None, past_key_value=None, use_cache=0):
        y, cache = self.attention(
            self.attention_norm(x), attention_mask, position_ids, past_key_value
        )
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)).tanh(), cache


class InternLM2Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, inputs_embeds, attention_mask, position_ids, past_key_values):
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        length = inputs_embeds.shape[1]
        lowest = torch.finfo(inputs_embeds.dtype).min
        mask = torch.full((length, past + length), lowest).triu(past + 1)[None, None]
        mask = mask.masked_fill((attention_mask == 0)[:, None, None, :], lowest)
        x, present = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values[index]
            x, cache = layer(x, mask, position_ids, cache, use_cache=True)
            present.append(cache)
        return self.norm(x), tuple(present)


class InternLM2ForCausalLM(PreTrainedModel):
    config_class = InternLM2Config

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.model.tok_embeddings(input_ids)
        hidden, cache = self.model(inputs_embeds, attention_mask, position_ids, past_key_values)
        return CausalLMOutputWithPast(logits=self.output(hidden), past_key_values=cache)
