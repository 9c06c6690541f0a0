"""InternVL in transformers: the tiles of an image in a row, each with as many features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, pixel_sample
from qeff_proxy_vision.towers import FeaturesPart, pixel_part

__all__ = ["build_proxy", "decode", "preprocess"]


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower, pixel shuffle and projector; the language model is cut as usual."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config = model.config
    vision, text = config.vision_config, config.text_config
    height, width = vision.image_size
    patch_height, patch_width = vision.patch_size
    patches = (height // patch_height) * (width // patch_width)
    rows = int(patches * config.downsample_ratio**2)
    tile = (vision.num_channels, height, width)
    part = pixel_part(
        FeaturesPart(model.model),
        model.dtype,
        tile,
        {"image_features": ("batch", rows, text.hidden_size)},
    )

    sample = pixel_sample(tile, rows, config.image_token_id, text.vocab_size, tiles=2)
    settings = ImageSettings(config.image_token_id, rows_per_tile=rows)
    return add_vision(text_proxy, part, settings, sample)
