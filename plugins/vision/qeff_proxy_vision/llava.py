"""LLaVA: a tower for images of one size (CLIP, SigLIP); with another it is any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision import image_text
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.known_tiles import add_tiles
from qeff_proxy_vision.proxy import VisionProxy, cut_text

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
    config, vision = model.config, model.config.vision_config
    blank = torch.zeros(2, vision.num_channels, *(vision.image_size,) * 2, dtype=model.dtype)
    with torch.no_grad():
        images, rows, _ = model.model.vision_tower(blank.to(model.device)).last_hidden_state.shape
    if images != len(blank) or "image_size" in options:  # or the tower joins all images
        return image_text.build_proxy(model, embedding, lm_head, kind, options)
    rows -= config.vision_feature_select_strategy == "default"  # the class token
    return add_tiles(model, cut_text(model, embedding, lm_head, kind, options), rows)
