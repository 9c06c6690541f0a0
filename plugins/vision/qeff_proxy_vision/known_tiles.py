"""Models whose images are tiles of one size with as many feature rows each, and that are known.

`image_text` finds the same out by running a tower on several tiles, twice for an export: minutes,
where a tower has four thousand patches.
"""

from __future__ import annotations

from typing import Any

from qeff_proxy.parts import Proxy
from transformers import PreTrainedModel

from qeff_proxy_vision.fixed_image import FEATURES, FixedImagePart
from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.proxy import VisionProxy, add_vision, pixel_sample
from qeff_proxy_vision.towers import pixel_part

__all__ = ["add_tiles"]


def add_tiles(
    model: PreTrainedModel,
    text: Proxy,
    rows: int,
    *,
    tiles: int = 1,
    types: str | None = None,
    **settings: Any,
) -> VisionProxy:
    """The cut model, from its cut language model.

    Args:
        model: With ``get_image_features`` and a ``language_model`` in its ``model``.
        text: Its language model.
        rows: Feature rows of a tile.
        tiles: Of the image that the cut is verified with.
        types: As in `pixel_sample`.
        settings: More of `ImageSettings`.
    """
    config, vision = model.config, model.config.vision_config
    size = vision.image_size
    tile = (vision.num_channels, *((size, size) if isinstance(size, int) else size))
    module = FixedImagePart(model.model, "language_model", {})
    module.tiled = True
    shapes = {FEATURES: ("batch", rows, config.text_config.hidden_size)}
    part = pixel_part(module, model.dtype, tile, shapes)
    token_id, vocabulary = config.image_token_id, config.text_config.vocab_size
    sample = pixel_sample(tile, rows, token_id, vocabulary, tiles=tiles, types=types)
    return add_vision(text, part, ImageSettings(token_id, rows_per_tile=rows, **settings), sample)
