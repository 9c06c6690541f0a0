"""InternVL in transformers: the tiles of an image in a row, each with as many features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
    """A vision part with tower, pixel shuffle and projector; the language model is cut as usual."""
    if "image_size" in options:
        return image_text.build_proxy(model, embedding, lm_head, kind, options)
    config, vision = model.config, model.config.vision_config
    sides = zip(vision.image_size, vision.patch_size, strict=True)
    rows = int(math.prod(size // patch for size, patch in sides) * config.downsample_ratio**2)
    return add_tiles(model, cut_text(model, embedding, lm_head, kind, options), rows, tiles=2)
