"""Gemma3: an image's tokens attend to each other in both directions, in full and sliding layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision import image_text
from qeff_proxy_vision.image_settings import Blocks
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.known_tiles import add_tiles
from qeff_proxy_vision.proxy import VisionProxy, cut_text

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
    if "image_size" in options:
        return image_text.build_proxy(model, embedding, lm_head, kind, options)
    text, config = cut_text(model, embedding, lm_head, kind, options), model.config
    more = {"table_rows": config.text_config.vocab_size, "blocks": Blocks(_TYPES, "run")}
    return add_tiles(model, text, config.mm_tokens_per_image, types=_TYPES, **more)
