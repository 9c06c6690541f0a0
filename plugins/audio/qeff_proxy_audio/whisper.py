"""Whisper: a recognizer of windows of one length, which stay so in its graphs.

A longer sound comes with the mask of its frames, for transformers' generation in windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensor
from qeff_proxy.errors import UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_unused
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_audio.any_speech import decode, locate_embedding, locate_lm_head, proxy_of
from qeff_proxy_audio.sound import feature_extractor_of, sounds_of, tensor_of

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """As of other recognizers, for windows of one length."""
    config = model.config
    positions = int(config.max_source_positions)
    frames = 2 * positions  # the second convolution halves their number
    shape = ("batch", int(config.num_mel_bins), frames)
    sound = TensorSpec("input_features", dtype_name(model.dtype), shape)
    proxy = proxy_of(model, embedding, lm_head, kind, sound, {}, positions=positions)
    return proxy and replace(proxy, settings={**proxy.settings, "frames": frames})


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """``input_features [sounds, mel, frames]``; for long sounds also the mask of their frames."""
    if request.inputs is not None:
        return _given(request.inputs)
    extractor = feature_extractor_of(processor)
    rate = int(extractor.sampling_rate)
    sounds = sounds_of(request, rate)
    arguments: dict[str, Any] = {"sampling_rate": rate, "return_tensors": "pt"}
    if max(len(sound) for sound in sounds) > extractor.n_samples:
        arguments |= {"truncation": False, "padding": "longest", "return_attention_mask": True}
    tensors = extractor(sounds, **arguments)
    return {name: torch.as_tensor(tensors[name]) for name in tensors}


def _given(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The user's tensors, checked."""
    refuse_unused(inputs, ("input_features", "attention_mask", "decoder_input_ids"))
    tensors = {"input_features": tensor_of(inputs, "input_features", ("sounds", "mel", "frames"))}
    if inputs.get("attention_mask") is not None:
        mask = tensor_of(inputs, "attention_mask", ("sounds", "frames"))
        sounds, _, frames = tensors["input_features"].shape
        if mask.shape != (sounds, frames):
            raise UsageError(
                f"attention_mask has shape {list(mask.shape)}",
                f"These features need [{sounds}, {frames}].",
            )
        tensors["attention_mask"] = mask
    if inputs.get("decoder_input_ids") is not None:
        ids = given_tensor("decoder_input_ids", inputs["decoder_input_ids"], "Give token ids.")
        tensors["decoder_input_ids"] = ids
    return tensors
