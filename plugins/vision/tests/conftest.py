"""Tiny vision-language models with random weights, and prompts for them.

Norms and biases are random too, so that a cut that left one out would show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from qeff_proxy_vision.tiles import TileGrid
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
)

IMAGE_TOKEN = 98
VOCABULARY = 99
FAMILIES = ("llava", "llava_next", "gemma3", "internvl", "molmo2", "granite4_vision")
#: Families that say which tokens are an image's, in the tensor of that name.
TYPES = {"gemma3": "token_type_ids", "molmo2": "mm_token_type_ids"}

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SIZES = [[28, 50], [56, 20], [50, 56]]  # heights and widths of images of several proportions


def with_random_weights(model, gain=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.get_text_config().tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
            if tied and name.endswith("embed_tokens.weight"):
                parameter.mul_(0.2)  # else the model only repeats what it reads
            if tied and name.endswith("language_model.norm.weight"):
                parameter.add_(4)
    return model.eval()


def make_llava():
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**CLIP, "projection_dim": 32},
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_TOKEN,
            image_seq_length=16,
        )
    )


def make_llava_next():
    """Granite Vision: Granite's multipliers, several layers of the tower."""
    text = {
        "model_type": "granite",
        **TEXT,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
    }
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIP,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=[-2, -1],
            image_grid_pinpoints=PINPOINTS,
        )
    )


def make_gemma3():
    """The image token lies beyond the embedding table, and one layer in three sees everything."""
    text = {
        **TEXT,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "vocab_size": IMAGE_TOKEN - 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config={**SIGLIP, "vision_use_head": False},
            text_config=text,
            mm_tokens_per_image=4,
            image_token_id=IMAGE_TOKEN,
        )
    )


def make_internvl():
    vision = {**TOWER, "image_size": [28, 28], "patch_size": [7, 7]}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_TOKEN,
        )
    )


def make_molmo2():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return Molmo2ForConditionalGeneration(
        Molmo2Config(
            vision_config={**TOWER, **heads, "image_size": [28, 28]},
            adapter_config={
                **heads,
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "intermediate_size": 48,
                "text_hidden_size": 64,
            },
            text_config={**TEXT, "head_dim": 16, "vocab_size": 90, "additional_vocab_size": 9},
            image_patch_id=IMAGE_TOKEN,
        )
    )


def make_granite4_vision():
    text = {**TEXT, "num_hidden_layers": 6, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    qformer = {
        "model_type": "blip_2_qformer",
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
    }
    return Granite4VisionForConditionalGeneration(
        Granite4VisionConfig(
            vision_config={**SIGLIP, "hidden_size": 64},
            text_config=text,
            qformer_config=qformer,
            image_token_index=IMAGE_TOKEN,
            downsample_rate="1/2",
            deepstack_layer_map=[[-1, 0], [-2, 2]],
            spatial_target_layers=[1, 3, 4, 5],
            vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS,
        )
    )


@dataclass(frozen=True)
class Images:
    """Images as a family's processor gives them, and the image tokens that each needs."""

    tensors: dict[str, torch.Tensor]
    tokens: list[int]


def make_images(family, count):
    generator = torch.Generator().manual_seed(count)
    if family == "molmo2":
        pooling = [torch.randperm(16, generator=generator)[:12] + 16 * i for i in range(count)]
        pooling = torch.stack(pooling).reshape(-1, 4)
        pooling[1::3, 2:] = -1
        tensors = {
            "pixel_values": torch.randn(count, 16, 147, generator=generator),
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[1, 3, 0, 0]] * count),
        }
        return Images(tensors, [3] * count)
    if family in {"llava_next", "granite4_vision"}:
        grid = TileGrid(PINPOINTS, 28, 4 if family == "llava_next" else 2)
        sizes = SIZES[:count]
        tensors = {
            "pixel_values": torch.randn(count, 5, 3, 28, 28, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }
        return Images(tensors, [grid.order(np.array([size])).size for size in sizes])
    tokens = {"llava": 16, "gemma3": 4, "internvl": 4}[family]
    return Images(
        {"pixel_values": torch.randn(count, 3, 28, 28, generator=generator)}, [tokens] * count
    )


def make_prompt(family, images_per_row, seed=7):
    """A batch of prompts, padded on the left, with so many images in each row."""
    count = sum(images_per_row)
    images = make_images(family, count) if count else Images({}, [])
    tokens = iter(images.tokens)
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(1, 90, (length,), generator=generator).tolist()

    rows = []
    for index, in_row in enumerate(images_per_row):
        row = text(4)
        for _ in range(in_row):
            row += [IMAGE_TOKEN] * next(tokens) + text(2)
        rows.append(row + text(3 + index))
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    prompt = {"input_ids": ids, "attention_mask": mask, **images.tensors}
    if family in TYPES:
        prompt[TYPES[family]] = (ids == IMAGE_TOKEN).to(torch.int64)
    return prompt


@pytest.fixture(scope="session")
def make_model():
    """Makes the tiny model of a family."""

    def make(family):
        # Granite 4's many layers would make more of rounding errors than of anything else.
        gain = 1.0 if family == "granite4_vision" else 1.5
        return with_random_weights(globals()[f"make_{family}"](), gain)

    return make


@pytest.fixture
def prompt_for():
    """Makes a prompt for a family: `make_prompt`."""
    return make_prompt
