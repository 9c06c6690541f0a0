"""LLaVA 1.5: image features replace the embeddings of the image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, pixel_sample
from qeff_proxy_vision.towers import TowerPart, pixel_part

__all__ = ["build_proxy", "decode", "preprocess"]


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower and projector; the language model is cut as usual."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config, inner = model.config, model.model
    vision = config.vision_config
    module = TowerPart(
        inner.vision_tower,
        inner.multi_modal_projector,
        config.vision_feature_layer,
        skip_first=config.vision_feature_select_strategy == "default",
    )
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    hidden = config.text_config.hidden_size
    with torch.no_grad():
        blank = torch.zeros(2, *tile, dtype=model.dtype, device=model.device)
        images, rows, _ = module(blank)["image_features"].shape
    if images != len(blank):
        raise UnsupportedModelError(
            f"its image tower ({vision.model_type}) joins all images into one sequence, which the "
            "llava plugin does not cut",
            "Towers that give a fixed number of rows for each image (CLIP, SigLIP) are supported.",
        )
    part = pixel_part(module, model.dtype, tile, {"image_features": ("batch", rows, hidden)})

    vocabulary = config.text_config.vocab_size
    sample = pixel_sample(tile, rows, config.image_token_id, vocabulary)
    settings = ImageSettings(config.image_token_id, rows_per_tile=rows)
    return add_vision(text_proxy, part, settings, sample)
