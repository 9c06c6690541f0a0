"""LLaVA-NeXT, and Granite Vision, which is LLaVA-NeXT with a Granite language model.

An image is an overview tile and a grid of tiles (`TileGrid`); each line ends with a learned row.
Granite multiplies embeddings in its language model's forward pass, so that stays in the body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, grid_sample
from qeff_proxy_vision.tiles import TileGrid
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
    """A vision part with tower, projector and newline row; the language model is cut as usual."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config, inner = model.config, model.model
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    grid = TileGrid(config.image_grid_pinpoints, vision.image_size, side)
    module = TowerPart(
        inner.vision_tower,
        inner.multi_modal_projector,
        config.vision_feature_layer,
        skip_first=config.vision_feature_select_strategy == "default",
        newline=inner.image_newline,
    )
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    hidden = config.text_config.hidden_size
    part = pixel_part(module, model.dtype, tile, {"image_features": ("rows", hidden)})

    vocabulary = config.text_config.vocab_size
    sample = grid_sample(grid, tile, config.image_token_id, vocabulary)
    settings = ImageSettings(config.image_token_id, grid=grid)
    return add_vision(text_proxy, part, settings, sample)
