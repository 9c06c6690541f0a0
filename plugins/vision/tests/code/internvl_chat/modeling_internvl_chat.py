"""A model with the module structure and habits of InternVL's own code, written for these tests.

Like that, it imports a package that inference does not need, does not run ``post_init``, and takes
an image in each call.
"""

import torch
from timm.models.layers import DropPath
from torch import nn
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internvl_chat import InternVLChatConfig
from .modeling_internlm2 import InternLM2ForCausalLM


class VisionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attn = nn.MultiheadAttention(
            config.hidden_size, config.num_attention_heads, batch_first=True
        )
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)
        self.drop_path = DropPath(0.1)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.drop_path(self.attn(y, y, y, need_weights=False)[0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patch = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.randn(1, patches + 1, config.hidden_size))
        self.layers = nn.ModuleList([VisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, pixel_values):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return x


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"

    def __init__(self, config):
        super().__init__(config)
        self.downsample_ratio = config.downsample_ratio
        patches = (config.force_image_size // config.vision_config.patch_size) ** 2
        self.num_image_token = int(patches * self.downsample_ratio**2)
        self.vision_model = VisionModel(config.vision_config)
        own = config.llm_config.model_type == "internlm2"
        language_model = InternLM2ForCausalLM if own else Qwen2ForCausalLM
        self.language_model = language_model(config.llm_config)
        width = config.vision_config.hidden_size * 4
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.llm_config.hidden_size), nn.GELU()
        )
        self.img_context_token_id = None

    def pixel_shuffle(self, x):
        n, w, h, c = x.size()
        x = x.view(n, w, h // 2, c * 2).permute(0, 2, 1, 3).contiguous()
        return x.view(n, h // 2, w // 2, c * 4).permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values):
        x = self.vision_model(pixel_values)[:, 1:, :]
        side = int(x.shape[1] ** 0.5)
        x = self.pixel_shuffle(x.reshape(x.shape[0], side, side, -1))
        return self.mlp1(x.reshape(x.shape[0], -1, x.shape[-1]))

    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        embeddings = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        selected = input_ids == self.img_context_token_id
        embeddings[selected] = features.reshape(-1, embeddings.shape[-1])
        outputs = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=return_dict,
        )
        return CausalLMOutputWithPast(
            logits=outputs.logits, past_key_values=outputs.past_key_values
        )
