"""Tiny models of each family with random weights, and prompts for them, for demos and tests.

Norms and biases are random too, so that a cut without one is detected. The models take images of 28
x 28 pixels and have 99 tokens, the last of which is the image token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    PreTrainedModel,
)

from qeff_proxy_vision.tiles import TileGrid

__all__ = ["FAMILIES", "IMAGE_TOKEN", "make_model", "make_prompt", "with_random_weights"]

IMAGE_TOKEN = 98
_VOCABULARY = 99
#: Families whose processor marks the image tokens, in the tensor of that name.
_TYPES = {"gemma3": "token_type_ids", "molmo2": "mm_token_type_ids"}

_SIDE = 28
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": _SIDE,
    "patch_size": 7,
}
_CLIP = {"model_type": "clip_vision_model", **_TOWER}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 256,
}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
_SIZES = [[28, 50], [56, 20], [50, 56]]  # heights and widths of images of several proportions


def make_model(family: str) -> PreTrainedModel:
    """The tiny model of a family, the same in each call."""
    # With Granite 4's many layers a larger gain would amplify rounding errors.
    gain = 1.0 if family == "granite4_vision" else 1.5
    return with_random_weights(_MODELS[family](), gain)


def with_random_weights(model: PreTrainedModel, gain: float, seed: int = 0) -> PreTrainedModel:
    """Set random weights, norms and biases so that the model neither repeats tokens nor overflows.

    Args:
        model: The model, which is changed.
        gain: Of matrices; 1 preserves the magnitude of activations.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
            if tied and name.endswith("embed_tokens.weight"):
                parameter.mul_(0.2)  # otherwise the model only repeats its input
            if tied and name.endswith("language_model.norm.weight"):
                parameter.add_(4)
    return model.eval()


def _make_llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**_CLIP, "projection_dim": 32},
            text_config={"model_type": "llama", **_TEXT},
            image_token_id=IMAGE_TOKEN,
            image_seq_length=16,
        )
    )


def _make_llava_next() -> PreTrainedModel:
    """Granite Vision: Granite's multipliers, several layers of the tower."""
    text = {
        "model_type": "granite",
        **_TEXT,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
    }
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=_CLIP,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=[-2, -1],
            image_grid_pinpoints=_PINPOINTS,
        )
    )


def _make_gemma3() -> PreTrainedModel:
    """The image token is beyond the embedding table; every third layer has full attention."""
    text = {
        **_TEXT,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "vocab_size": IMAGE_TOKEN - 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config={**_SIGLIP, "vision_use_head": False},
            text_config=text,
            mm_tokens_per_image=4,
            image_token_id=IMAGE_TOKEN,
        )
    )


def _make_internvl() -> PreTrainedModel:
    vision = {**_TOWER, "image_size": [_SIDE, _SIDE], "patch_size": [7, 7]}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **_TEXT},
            image_token_id=IMAGE_TOKEN,
        )
    )


def _make_molmo2() -> PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return Molmo2ForConditionalGeneration(
        Molmo2Config(
            vision_config={**_TOWER, **heads, "image_size": [_SIDE, _SIDE]},
            adapter_config={
                **heads,
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "intermediate_size": 48,
                "text_hidden_size": 64,
            },
            text_config={**_TEXT, "head_dim": 16, "vocab_size": 90, "additional_vocab_size": 9},
            image_patch_id=IMAGE_TOKEN,
        )
    )


def _make_granite4_vision() -> PreTrainedModel:
    text = {**_TEXT, "num_hidden_layers": 6, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    qformer = {
        "model_type": "blip_2_qformer",
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
    }
    return Granite4VisionForConditionalGeneration(
        Granite4VisionConfig(
            vision_config={**_SIGLIP, "hidden_size": 64},
            text_config=text,
            qformer_config=qformer,
            image_token_index=IMAGE_TOKEN,
            downsample_rate="1/2",
            deepstack_layer_map=[[-1, 0], [-2, 2]],
            spatial_target_layers=[1, 3, 4, 5],
            vision_feature_select_strategy="full",
            image_grid_pinpoints=_PINPOINTS,
        )
    )


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _make_llava,
    "llava_next": _make_llava_next,
    "gemma3": _make_gemma3,
    "internvl": _make_internvl,
    "molmo2": _make_molmo2,
    "granite4_vision": _make_granite4_vision,
}
#: Model types with a tiny model.
FAMILIES = tuple(_MODELS)


@dataclass(frozen=True)
class _Images:
    """Images like the output of a family's processor, and the number of image tokens of each."""

    tensors: dict[str, torch.Tensor]
    tokens: list[int]


def _make_images(family: str, count: int) -> _Images:
    generator = torch.Generator().manual_seed(count)
    if family == "molmo2":
        crops = [torch.randperm(16, generator=generator)[:12] + 16 * i for i in range(count)]
        pooling = torch.stack(crops).reshape(-1, 4)
        pooling[1::3, 2:] = -1
        tensors = {
            "pixel_values": torch.randn(count, 16, 147, generator=generator),
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[1, 3, 0, 0]] * count),
        }
        return _Images(tensors, [3] * count)
    if family in {"llava_next", "granite4_vision"}:
        resolutions = tuple((height, width) for height, width in _PINPOINTS)
        grid = TileGrid(resolutions, _SIDE, 4 if family == "llava_next" else 2)
        sizes = _SIZES[:count]
        tensors = {
            "pixel_values": torch.randn(count, 5, 3, _SIDE, _SIDE, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }
        return _Images(tensors, [grid.order(np.array([size])).size for size in sizes])
    tokens = {"llava": 16, "gemma3": 4, "internvl": 4}[family]
    pixels = torch.randn(count, 3, _SIDE, _SIDE, generator=generator)
    return _Images({"pixel_values": pixels}, [tokens] * count)


def make_prompt(
    family: str, images_per_row: Sequence[int], seed: int = 7
) -> dict[str, torch.Tensor]:
    """A batch of prompts, padded on the left, with images of noise.

    Args:
        family: One of `FAMILIES`.
        images_per_row: How many images each prompt has; at most three in all.
        seed: Of the text.

    Returns:
        Tensors like the output of the family's processor.
    """
    count = sum(images_per_row)
    images = _make_images(family, count) if count else _Images({}, [])
    tokens = iter(images.tokens)
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Any:
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
    if family in _TYPES:
        prompt[_TYPES[family]] = (ids == IMAGE_TOKEN).to(torch.int64)
    return prompt
