"""Whisper: an encoder that runs once per window, and a decoder with a cache.

The encoder part also computes the keys and values of every decoder layer's cross attention,
``cross_key_values.<layer>.key`` and ``.value``, so that they are computed only once. The decoder is
cut at its token embedding, ``model.decoder.embed_tokens``, and at ``proj_out``, which are tied; its
position embedding stays in the body. One decoder graph serves prefill and decode steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensor
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.families.cross_attention import CrossAttention, probe_cross_attention
from qeff_proxy.families.encoder_decoder import (
    EncoderPart,
    decoder_parts,
)
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_unused
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedConfig, PreTrainedModel

from qeff_proxy_audio.sound import feature_extractor_of, sounds_of, tensor_of

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site:
    """The decoder's token embedding; the position embedding stays in the body.

    Raises:
        UnsupportedModelError: It is the decoder alone, whose cross attention needs an encoder.
    """
    if not hasattr(model.base_model, "encoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is Whisper's decoder without its encoder",
            "Export the whole recognizer (QEFFAutoModelForSpeechSeq2Seq).",
        )
    return Site("model.decoder.embed_tokens")


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site | Absent:
    """``proj_out``, without a bias."""
    if "proj_out" not in dict(model.named_children()):
        return Absent(f"{type(model).__name__} gives hidden states")
    return Site("proj_out")


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """Encoder, token embedding, decoder body and head; encoder and decoder if not split."""
    if isinstance(lm_head, Absent) or isinstance(embedding, Absent):
        return None
    config = model.config
    width, length = int(config.d_model), int(config.max_source_positions)
    attention = probe_cross_attention(model.get_decoder(), width, width)
    parts = (
        _encoder(model, attention),
        *decoder_parts(model, attention, (embedding, lm_head), kind, length),
    )
    vocabulary = int(model.get_submodule(lm_head.module).weight.shape[0])
    settings = {"vocabulary": vocabulary, "hidden_size": width, "frames": _frames(config)}
    return Proxy(kind, "speech-seq2seq", parts, settings)


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


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """``texts``, and with timestamps also ``segments`` with start, end and text."""
    if processor is None or "generated_ids" not in outputs:
        return None
    texts = [
        text.strip()
        for text in processor.batch_decode(outputs["generated_ids"], skip_special_tokens=True)
    ]
    segments = outputs.get("segments")
    if segments is not None:
        segments = [
            [
                {
                    "start": float(piece["start"]),
                    "end": float(piece["end"]),
                    "text": processor.decode(piece["tokens"], skip_special_tokens=True).strip(),
                }
                for piece in of_one
            ]
            for of_one in segments
        ]
    return {"texts": texts, "segments": segments}


def _frames(config: PreTrainedConfig) -> int:
    """Frames of a window; the second convolution halves their number."""
    return 2 * int(config.max_source_positions)


def _encoder(model: PreTrainedModel, attention: CrossAttention) -> Part:
    config, dtype = model.config, dtype_name(model.dtype)
    shape = ("batch", int(config.num_mel_bins), _frames(config))
    features = TensorSpec("input_features", dtype, shape)
    module = EncoderPart(
        model.get_encoder(), model.get_decoder(), attention, features.name, features.name
    )
    cross = attention.cross_specs(dtype, int(config.max_source_positions))
    return Part("encoder", module, (features,), cross, "encoder")


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
