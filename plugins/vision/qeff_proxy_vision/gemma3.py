"""Gemma3: an image's tokens attend to each other in both directions, in full and sliding layers.

The model scales embeddings by the square root of the hidden size inside the embedding module, so
the image features that replace embeddings are not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import Blocks, ImageSettings
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, pixel_sample
from qeff_proxy_vision.towers import FeaturesPart, pixel_part

__all__ = ["build_proxy", "decode", "preprocess"]

_TYPES = "token_type_ids"


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower and pooling projector; the language model is cut as usual."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config = model.config
    vision, text = config.vision_config, config.text_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    rows = config.mm_tokens_per_image
    part = pixel_part(
        FeaturesPart(model.model),
        model.dtype,
        tile,
        {"image_features": ("batch", rows, text.hidden_size)},
    )

    sample = pixel_sample(tile, rows, config.image_token_id, text.vocab_size, types=_TYPES)
    settings = ImageSettings(
        config.image_token_id,
        blocks=Blocks(_TYPES, "run"),
        table_rows=text.vocab_size,
        rows_per_tile=rows,
    )
    return add_vision(text_proxy, part, settings, sample)
