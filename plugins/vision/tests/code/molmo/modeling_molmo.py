"""A model with the module structure and habits of Molmo's own code, written for these tests.

Like that, it keeps its cache as tuples, caches its rotary table in a plain dict, cuts its mask out
of one with a row for each position, has an embedding of two tables, a ``tie_weights`` without
arguments, and no ``post_init``.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config_molmo import MolmoConfig


@dataclass
class VisionBackboneConfig:
    image_patch_size: int = 7
    image_emb_dim: int = 32
    image_num_patch: tuple = (4, 4)


@dataclass
class FullMolmoConfig:
    d_model: int
    n_layers: int
    vocab_size: int
    n_heads: int = 4
    effective_n_kv_heads: int = 2
    max_position_embeddings: int = 256
    weight_tying: bool = False
    scale_logits: bool = True
    normalize_input_embeds: bool = True
    vision_backbone: VisionBackboneConfig = field(default_factory=VisionBackboneConfig)

    def llm_patches_per_crop(self):
        return 2, 2


class Embedding(nn.Module):
    def __init__(self, rows, new_rows, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(rows, width))
        self.new_embedding = nn.Parameter(torch.randn(new_rows, width))

    def forward(self, x):
        return functional.embedding(x, torch.cat([self.embedding, self.new_embedding], dim=0))


class RotaryEmbedding(nn.Module):
    def __init__(self, config, cache):
        super().__init__()
        width = config.d_model // config.n_heads
        # Named, since models are made on the meta device, which would take the table for a weight.
        device = torch.device("cpu")
        steps = 1.0 / 10000 ** (torch.arange(0, width, 2, device=device).float() / width)
        positions = torch.arange(config.max_position_embeddings, device=device).float()
        angles = positions[:, None] * steps
        angles = torch.cat([angles, angles], dim=-1)
        self._cache = cache
        cache["sin"], cache["cos"] = angles.sin(), angles.cos()

    def forward(self, x, position_ids):
        sin, cos = (self._cache[name][position_ids][:, None] for name in ("sin", "cos"))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin


class Block(nn.Module):
    def __init__(self, config, cache):
        super().__init__()
        self.config = config
        self.rotary_emb = RotaryEmbedding(config, cache)
        width = config.d_model // config.n_heads
        kv = config.effective_n_kv_heads * width
        self.fused = (config.d_model, kv, kv)
        self.attn_norm = nn.RMSNorm(config.d_model)
        self.att_proj = nn.Linear(config.d_model, sum(self.fused))
        self.attn_out = nn.Linear(config.d_model, config.d_model)
        self.ff_norm = nn.RMSNorm(config.d_model)
        self.ff = nn.Linear(config.d_model, config.d_model)

    def _scaled_dot_product_attention(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False
    ):
        times = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(times, dim=1, output_size=q.size(1)) for x in (k, v))
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal
        )

    def forward(self, x, attention_bias=None, position_ids=None, layer_past=None, use_cache=False):
        batch, length, _ = x.shape
        width = self.config.d_model // self.config.n_heads
        parts = self.att_proj(self.attn_norm(x)).split(self.fused, dim=-1)
        q, k, v = (part.view(batch, length, -1, width).transpose(1, 2) for part in parts)
        q, k = self.rotary_emb(q, position_ids), self.rotary_emb(k, position_ids)
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k], dim=-2), torch.cat([layer_past[1], v], dim=-2)
        present = (k, v) if use_cache else None
        if attention_bias is not None:
            queries, keys = q.shape[-2], k.shape[-2]
            attention_bias = attention_bias[:, :, keys - queries : keys, :keys]
        attended = self._scaled_dot_product_attention(
            q, k, v, attn_mask=attention_bias, is_causal=attention_bias is None
        )
        x = x + self.attn_out(attended.transpose(1, 2).reshape(batch, length, -1))
        return x + functional.silu(self.ff(self.ff_norm(x))), present


class VisionBackbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = config.vision_backbone
        self.patch = nn.Linear(vision.image_patch_size**2 * 3, vision.image_emb_dim)
        self.pad_embed = nn.Parameter(torch.randn(vision.image_emb_dim))
        self.projector = nn.Linear(vision.image_emb_dim * 4, config.d_model)

    def forward(self, images, image_masks):
        empty = torch.all(images == -1, dim=(2, 3), keepdim=True)
        x = self.patch(images) * ~empty
        x = x + self.pad_embed * (image_masks == 0).to(x.dtype).unsqueeze(-1)
        batch, crops = x.shape[:2]
        x = x.reshape(batch, crops, 2, 2, 2, 2, -1).transpose(3, 4)
        return self.projector(torch.tanh(x.reshape(batch, crops, 4, -1))), None


class Molmo(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        cache = {}
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, 16, config.d_model),
                "ln_f": nn.RMSNorm(config.d_model),
                "blocks": nn.ModuleList([Block(config, cache) for _ in range(config.n_layers)]),
                "ff_out": nn.Linear(config.d_model, config.vocab_size, bias=False),
            }
        )
        self.vision_backbone = VisionBackbone(config)

    def forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        images,
        image_masks,
        image_input_idx,
        past_key_values,
        use_cache,
    ):
        x = self.transformer.wte(input_ids)
        if images is not None:
            features, _ = self.vision_backbone(images, image_masks)
            batch = x.shape[0]
            features = features.view(batch, -1, features.shape[-1])
            index = image_input_idx.view(batch, -1)
            rows, columns = torch.nonzero(index >= 0, as_tuple=True)
            x[rows, index[rows, columns]] += features[rows, columns]
        x = x * self.config.d_model**0.5
        total = attention_mask.shape[1]
        lowest = torch.finfo(x.dtype).min
        bias = torch.full((total, total), lowest).triu(1)[None, None]
        hidden = (attention_mask == 0)[:, None, None, :] & ~torch.eye(total, dtype=torch.bool)
        bias = bias.masked_fill(hidden, lowest)
        present = []
        for index, block in enumerate(self.transformer.blocks):
            past = None if past_key_values is None else past_key_values[index]
            x, cache = block(x, bias, position_ids, past, use_cache=use_cache)
            present.append(cache)
        logits = self.transformer.ff_out(self.transformer.ln_f(x))
        return logits * self.config.d_model**-0.5, present


class MolmoForCausalLM(PreTrainedModel):
    config_class = MolmoConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Molmo(
            FullMolmoConfig(config.hidden_size, config.num_hidden_layers, config.vocab_size)
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        images=None,
        image_masks=None,
        image_input_idx=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        logits, present = self.model(
            input_ids,
            attention_mask,
            position_ids,
            images,
            image_masks,
            image_input_idx,
            past_key_values,
            use_cache,
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=present)

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def tie_weights(self):
        pass
