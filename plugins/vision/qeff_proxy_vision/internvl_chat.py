"""InternVL from the checkpoints' code (``InternVLChatModel``, InternVL 1.5 to 3).

Its language model is transformers' and is cut like any other, or InternLM2. The checkpoints have a
tokenizer and no processor, so this module cuts images into tiles and writes prompts, by the rules
of their model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_tensor
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.generic import path_of
from qeff_proxy.families.tokenize import tokenize
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.load.checkpoint_files import find_checkpoint, read_config_file
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision import internlm2
from qeff_proxy_vision.chat_template import in_chat_template
from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.images import open_image
from qeff_proxy_vision.inputs import checked_tensors, count_error, decode, prompts_and_images
from qeff_proxy_vision.own_code import stepped_logits
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, marked_text, pixel_sample
from qeff_proxy_vision.remote import DROP_PATH, load_adapted
from qeff_proxy_vision.tiles import normalized, split_into_tiles
from qeff_proxy_vision.towers import FeaturesPart, pixel_part

__all__ = [
    "CONTEXT",
    "Loader",
    "build_proxy",
    "decode",
    "locate_embedding",
    "locate_lm_head",
    "preprocess",
]

_IMAGE = "<image>"
#: The text of the image token.
CONTEXT = "<IMG_CONTEXT>"
_PREFIX = "language_model."


class Loader:
    """Loads such a checkpoint; an entry point of the group ``qeff_proxy.remote_code``."""

    @staticmethod
    def from_pretrained(folder: Path, **arguments: Any) -> Any:
        """Like transformers' ``from_pretrained``; also looks up the id of the image token."""
        from transformers import AutoTokenizer

        config = read_config_file(folder)
        answer = load_adapted(folder, config.get("auto_map") or {}, DROP_PATH, **arguments)
        model = answer[0] if isinstance(answer, tuple) else answer
        if type(model.language_model).__name__ == internlm2.ARCHITECTURE:
            internlm2.fill_rotary_tables(model.language_model)
        else:
            model.language_model.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True
        )
        model.img_context_token_id = tokenizer.convert_tokens_to_ids(CONTEXT)
        return answer


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site | None:
    """The language model's own."""
    path = path_of(model, model.language_model.get_input_embeddings())
    return None if path is None else Site(path)


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site | None:
    """The language model's own."""
    path = path_of(model, model.language_model.get_output_embeddings())
    return None if path is None else Site(path)


def _cut_language_model(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> Proxy:
    """Cut a language model of transformers like any other, or InternLM2; refuse others."""
    architecture = type(model).__name__
    if architecture == internlm2.ARCHITECTURE:
        return marked_text(internlm2.build_language_parts(model), kind, options)
    if not type(model).__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"this InternVL has a language model in the checkpoint's code, {architecture}",
            f"Those of transformers (Qwen2, Llama …) and {internlm2.ARCHITECTURE} are supported.",
        )
    return cut_text(model, _inner_site(embedding), _inner_site(lm_head), kind, options)


def _inner_site(site: Site | Absent) -> Site | Absent:
    """The site with its path inside the language model."""
    return site if isinstance(site, Absent) else Site(site.module.removeprefix(_PREFIX))


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower, pixel shuffle and projector; the language model is cut as usual."""
    token_id = getattr(model, "img_context_token_id", None)
    if token_id is None:
        raise UnsupportedModelError(
            "the model does not know its image token",
            f"Set model.img_context_token_id = tokenizer.convert_tokens_to_ids({CONTEXT!r}).",
        )
    text = _cut_language_model(model.language_model, embedding, lm_head, kind, options)
    config = model.config
    size = config.force_image_size or config.vision_config.image_size
    tile = (3, size, size)
    rows = int(model.num_image_token)
    hidden = config.llm_config.hidden_size
    tower = replace_modules(model, {"language_model": nn.Identity()})
    module = FeaturesPart(tower, lambda own, pixel_values: own.extract_feature(pixel_values))
    part = pixel_part(module, model.dtype, tile, {"image_features": ("batch", rows, hidden)})

    vocabulary = config.llm_config.vocab_size
    sample = pixel_sample(tile, rows, token_id, vocabulary, tiles=2)
    return add_vision(
        text, part, ImageSettings(token_id, rows_per_tile=rows), sample, _model_logits
    )


def _model_logits(model: PreTrainedModel, tensors: Mapping[str, Array], new: Array) -> Array:
    """As `qeff_proxy_vision.reference.model_logits`; the model runs on images only."""
    first = model.language_model
    if "pixel_values" in tensors:
        pixels = to_tensor(tensors["pixel_values"]).to(model.dtype)
        flags = torch.ones(pixels.shape[0], 1, dtype=torch.int64)
        first = partial(model, pixel_values=pixels, image_flags=flags)
    return stepped_logits(first, model.language_model, tensors, new)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Tiles and token ids.

    An image is cut into as many tiles as fit its proportions, at most the number in the config or
    ``options={"max_tiles": …}``, and an overview. ``<image>`` in a prompt is its position; without
    it, images come first. The tokenizer's chat template is used if there is one.

    Returns:
        ``input_ids`` and ``attention_mask [batch, length]``, ``pixel_values [tiles, 3, height,
        width]``.
    """
    if request.inputs is not None:
        return checked_tensors(request.inputs)
    refuse_others(request, "prompts", "images")
    if not request.prompts or processor is None:
        return None
    config = read_config_file(
        find_checkpoint(processor.name_or_path, allow_pickle=False, trust_remote_code=False)
    )
    size = config.get("force_image_size") or config["vision_config"]["image_size"]
    patch = config["vision_config"]["patch_size"]
    rows = int((size // patch) ** 2 * config["downsample_ratio"] ** 2)
    most = int(request.options.get("max_tiles") or config.get("max_dynamic_patch") or 1)
    least = int(config.get("min_dynamic_patch") or 1)
    if not config.get("dynamic_image_size", True):
        least = most = 1
    texts: list[str] = []
    pixels: list[Array] = []
    for prompt, images in prompts_and_images(request, _IMAGE):
        if images and _IMAGE not in prompt:
            prompt = f"{_IMAGE}\n" * len(images) + prompt
        if prompt.count(_IMAGE) != len(images):
            hint = f"Write {_IMAGE} once for each image, or not at all."
            raise count_error(prompt, _IMAGE, len(images), hint)
        text = prompt
        if request.options.get("chat", True):
            text = in_chat_template(processor, prompt, first=not texts)
        for image in images:
            tiles = split_into_tiles(
                open_image(image), size, (least, most), overview=config.get("use_thumbnail", False)
            )
            pixels += [normalized(tile) for tile in tiles]
            text = text.replace(_IMAGE, f"<img>{CONTEXT * (rows * len(tiles))}</img>", 1)
        texts.append(text)
    tensors = tokenize(processor, texts)
    if pixels:
        tensors["pixel_values"] = torch.from_numpy(np.stack(pixels))
    return tensors
