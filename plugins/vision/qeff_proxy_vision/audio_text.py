"""Language models that take sounds in the place of tokens, cut by what they say of themselves.

As `qeff_proxy_vision.image_text` does with images: `sounds` finds the tower, `learn_sounds` watches
the language model on a prompt with sounds, and `add_sounds` puts the part before the others. Models
that take images, too, are `image_text`'s, which adds sounds by the same function.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, Proxy
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.language import (
    HINT,
    cut_language,
    decoder_path_of,
    special_tokens,
    with_inputs,
)
from qeff_proxy_vision.learn_images import TYPES, Learned, learn_lookups, learn_sounds
from qeff_proxy_vision.proxy import Sample, VisionProxy, add_towers
from qeff_proxy_vision.reference import generated_logits
from qeff_proxy_vision.sounds import (
    SOUND_FEATURES,
    Getter,
    SoundTower,
    find_tower,
    sound_getter,
    sound_token,
)

__all__ = ["SOUND_FLOW", "add_sounds", "build_proxy", "cut_with", "decode", "preprocess"]

#: The flow that runs models of sounds and texts.
SOUND_FLOW = "audio-text-to-text"


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A part from ``get_audio_features``; the language model is cut as usual."""
    get = sound_getter(model)
    if get is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no get_audio_features: its sounds do not become "
            "embeddings of tokens",
            HINT,
        )
    return cut_with(get, model, embedding, lm_head, kind, options)


def cut_with(
    get: Getter,
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
    *,
    apart: bool = False,
) -> VisionProxy:
    """The proxy of a model whose features of sounds ``get(model, **tensors)`` makes.

    With ``apart`` a sound that the processor splits into several is refused.
    """
    _token_of(model)
    text = cut_language(model, embedding, lm_head, kind, options)
    if not text.settings["kv_offload"]:
        raise UsageError(
            "the tower of sounds is a graph of its own, and kv_offload=False asks for one graph",
            "Leave kv_offload=False out.",
        )
    path = decoder_path_of(model, text)
    sample: Sample = partial(_texts, model, int(text.settings["embedding_rows"]))
    tower, settings, sample = add_sounds(model, text, path, get, options, sample)
    settings = replace(settings, apart=apart)
    text = with_inputs(text, [], settings.positions.axes if settings.positions else 0)
    return add_towers(text, [(tower, settings)], sample, generated_logits, SOUND_FLOW)


def add_sounds(
    model: PreTrainedModel,
    text: Proxy,
    decoder_path: str,
    get: Getter,
    options: Mapping[str, Any],
    sample: Sample,
    images: Learned | None = None,
) -> tuple[Part, ImageSettings, Sample]:
    """The part of sounds, how its features enter the language model, and a sample with sounds.

    Args:
        model: The model.
        text: The cut language model.
        decoder_path: Where that is in the model.
        get: Makes features of sounds.
        options: ``audio_frames``: of each sound, where a tower takes one number of frames.
        sample: Creates two prompts without sounds.
        images: How images enter the language model, if it takes any.

    Raises:
        UnsupportedModelError: Sounds do something that is not understood; says what.
    """
    name, token_id = type(model).__name__, _token_of(model)
    rows, width = int(text.settings["embedding_rows"]), int(text.settings["hidden_size"])
    frames = options.get("audio_frames")
    tower = find_tower(model, get, decoder_path, width, frames)
    fixed = tower.frames in tower.part.inputs[0].shape
    if fixed and frames is None and not tower.usual:
        warnings.warn(
            f"the tower of sounds of {name} is exported for sounds of {tower.frames} frames; "
            "audio_frames (-C audio_frames=N) sets another number",
            UserWarning,
            stacklevel=2,
        )
    with_sounds = partial(_with_sounds, sample, tower, token_id)
    decoder = model.get_submodule(decoder_path)
    masks = text.part("body").masks
    prompts = with_sounds()
    if images is None:
        learned_on = prompts
    else:  # alone, so that only what sounds add is seen
        learned_on = _with_sounds(partial(_texts, model, rows), tower, token_id)
        learned_on |= {n: torch.zeros_like(learned_on["input_ids"]) for n in TYPES if n in prompts}
    positions = learn_sounds(model, decoder, learned_on, tower.features, token_id, masks, images)
    special = sorted(number for number in special_tokens(model) if 0 <= number < rows)
    settings = ImageSettings(
        token_id,
        (Merge("replace", features=SOUND_FEATURES),),
        table_rows=rows if token_id >= rows else None,
        geometry=tower.geometry,
        positions=positions,
        looked_up_as={} if images is not None else learn_lookups(model, decoder, special),
        what="sound",
        counted=tower.counted,
        pads=tower.pads,
    )
    return tower.part, settings, with_sounds


def _token_of(model: PreTrainedModel) -> int:
    token_id = sound_token(model.config)
    if token_id is None:
        raise UnsupportedModelError(
            f"the config of {type(model).__name__} names no token of sounds, whose features may "
            "stand beside tokens, not in their place",
            HINT,
        )
    return token_id


def _usual_tokens(model: PreTrainedModel, rows: int) -> torch.Tensor:
    special = special_tokens(model)
    return torch.tensor([number for number in range(1, rows) if number not in special])


def _texts(model: PreTrainedModel, rows: int) -> dict[str, torch.Tensor]:
    """Two prompts of random tokens, the first padded."""
    usual = _usual_tokens(model, rows)
    generator = torch.Generator().manual_seed(0)
    ids = usual[torch.randint(len(usual), (2, 9), generator=generator)]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _with_sounds(sample: Sample, tower: SoundTower, token_id: int) -> dict[str, torch.Tensor]:
    """A sample whose second prompt ends with two sounds, and text behind each."""
    tensors = dict(sample())
    texts = tensors["input_ids"][:, -3:]
    pieces = []
    for count in tower.counts:
        sound = torch.full((1, count), token_id)
        plain = texts[:1].repeat(1, count // texts.shape[1] + 1)[:, :count]
        pieces += [torch.cat([plain, sound]), texts]
    more = torch.cat(pieces, dim=1)
    ones = torch.ones_like(more)
    added = {"input_ids": more, "attention_mask": ones, **dict.fromkeys(TYPES, 0 * ones)}
    for name, value in added.items():
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], value], dim=1)
    return {**tensors, **tower.sounds}
