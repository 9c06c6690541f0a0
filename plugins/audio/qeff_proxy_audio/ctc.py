"""Recognizers with a CTC head: Wav2Vec2, HuBERT, WavLM, SEW, Parakeet and others.

The input is samples or features of sound, so there is no token embedding. The head is the module
beside the encoder that has weights; it is cut off with its bias. The body is one graph from the
input to hidden states, for any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.families.decoder import HeadStub
from qeff_proxy.families.model_masks import provide_masks
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_unused
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_audio.sound import feature_extractor_of, sounds_of, tensor_of

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

# Frames of the sound that is traced.
_TRACE_FRAMES = 12
# Steps of the features that are traced, and of those that are checked.
_TRACE_STEPS, _CHECK_STEPS = 64, (48, 81)
#: What configs call the width of the features.
_BINS = (
    *("num_mel_bins", "feature_projection_input_dim"),
    *("input_dim", "input_feat_per_channel"),
)
#: How many of them may be one step of the input.
_STACKED = (1, 2, 4)


@hookimpl
def locate_embedding() -> Absent:
    """There is none."""
    return Absent("sound goes in, not token ids")


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site | Absent:
    """The module beside the encoder that has weights."""
    encoder, heads = _encoder_and_heads(model)
    if encoder is None or len(heads) != 1:
        return Absent(f"{type(model).__name__} has no CTC head")
    return Site(heads[0])


@hookimpl
def build_proxy(model: PreTrainedModel, lm_head: Site | Absent, kind: Kind) -> Proxy | None:
    """Body and head; one graph for ``stub`` and ``whole``."""
    encoder, _ = _encoder_and_heads(model)
    if isinstance(lm_head, Absent) or encoder is None:
        return None
    head = model.get_submodule(lm_head.module)
    weight = max(head.parameters(), key=torch.Tensor.dim)
    vocabulary, hidden_size = weight.shape[:2]
    dtype = dtype_name(model.dtype)
    settings = _settings(model, vocabulary)
    sound, edges = _sound_input(model, settings)
    hidden = TensorSpec("last_hidden_state", dtype, ("batch", "frames", hidden_size))
    logits = TensorSpec("logits", dtype, ("batch", "frames", vocabulary))
    parts: tuple[Part, ...]
    if kind == "split":
        body = CtcPart(encoder, sound.name, None)
        sizes_of_head = {"frames": _TRACE_FRAMES}
        parts = (
            Part("body", body, (sound,), (hidden,), "body", **edges),
            Part("lm_head", HeadPart(head), (hidden,), (logits,), "vocabulary", (), sizes_of_head),
        )
    else:
        whole = CtcPart(encoder, sound.name, HeadStub() if kind == "stub" else head)
        spec = TensorSpec("logits", dtype, hidden.shape if kind == "stub" else logits.shape)
        parts = (Part("model", whole, (sound,), (spec,), "model", **edges),)
    return Proxy(kind, "ctc", parts, settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """``input_values [sounds, samples]`` or ``input_features [sounds, steps, width]``.

    They are padded with zeros at the end, and ``lengths`` says how much is sound.
    """
    if request.inputs is not None:
        return _given(request.inputs)
    extractor = feature_extractor_of(processor)
    rate = int(extractor.sampling_rate)
    rows = []
    name = "input_values"
    for samples in sounds_of(request, rate):
        made = extractor(samples, sampling_rate=rate, return_tensors="np")
        name = next(name for name in ("input_values", "input_features") if name in made)
        row = np.asarray(made[name][0], dtype=np.float32)
        if "attention_mask" in made:  # features are padded to whole frames
            row = row[np.asarray(made["attention_mask"][0]) != 0]
        rows.append(row)
    longest = max(len(row) for row in rows)
    values = np.zeros((len(rows), longest, *rows[0].shape[1:]), np.float32)
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return {name: torch.from_numpy(values), "lengths": lengths}


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[str] | None:
    """Transcripts: repeated tokens are merged, blanks are removed."""
    if processor is None or "predicted_ids" not in outputs:
        return None
    if not hasattr(processor, "decode"):
        raise UsageError(
            f"{type_named(processor)} has no tokenizer to turn token ids into text",
            "Put vocab.json and tokenizer_config.json beside the checkpoint, or pass processor=.",
        )
    return [processor.decode(ids) for ids in outputs["predicted_ids"]]


class CtcPart(nn.Module):
    """Sound to hidden states, or with a head to logits.

    Args:
        encoder: The model without its head.
        entry: The name of its input.
        head: The module that follows it, or ``None``.
    """

    def __init__(self, encoder: nn.Module, entry: str, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.entry = entry
        self.head = head

    def forward(self, **sound: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, …]`` to ``last_hidden_state`` or ``logits``, ``[batch, frames, …]``."""
        # Rows are never padded, so every frame attends to all others.
        with provide_masks(self.encoder, {"bidirectional": None}):
            hidden = self.encoder(sound[self.entry])[0]
        if self.head is None:
            return {"last_hidden_state": hidden}
        return {"logits": self.head(hidden)}


class HeadPart(nn.Module):
    """``last_hidden_state`` to ``logits``, with the model's head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, positions, hidden]`` to ``logits [batch, positions, vocabulary]``."""
        return {"logits": self.head(last_hidden_state)}


def _encoder_and_heads(model: PreTrainedModel) -> tuple[PreTrainedModel | None, list[str]]:
    """The model in the model, and the names of the other children that have weights."""
    encoders, heads = [], []
    for name, child in model.named_children():
        if isinstance(child, PreTrainedModel):
            encoders.append(child)
        elif any(True for _ in child.parameters()):
            heads.append(name)
    return (encoders[0] if len(encoders) == 1 else None), heads


def _sound_input(
    model: PreTrainedModel, settings: Mapping[str, int]
) -> tuple[TensorSpec, dict[str, Any]]:
    """The input, and the sizes to trace and check it at."""
    if model.main_input_name == "input_values":
        samples = settings["shortest"] + settings["samples_per_frame"] * _TRACE_FRAMES
        return samples_input(model), {"trace_sizes": {"samples": samples}}
    return features_input(model, _encoder_and_heads(model)[0])


def samples_input(model: PreTrainedModel) -> TensorSpec:
    """The input of a model of samples."""
    return TensorSpec("input_values", dtype_name(model.dtype), ("batch", "samples"))


def features_input(
    model: PreTrainedModel, encoder: nn.Module | None
) -> tuple[TensorSpec, dict[str, Any]]:
    """The input of a model of features, and the sizes to trace and check it at.

    Raises:
        UnsupportedModelError: It takes something else, or its config does not say their width.
    """
    name = str(model.main_input_name)
    width = _feature_width(model, encoder) if name == "input_features" else None
    if width is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {name}, whose width its config does not say",
            f"Known are {', '.join(_BINS)}; a plugin for this model type can say it.",
        )
    spec = TensorSpec(name, dtype_name(model.dtype), ("batch", "steps", width))
    checks = tuple({"steps": steps} for steps in _CHECK_STEPS)
    return spec, {"trace_sizes": {"steps": _TRACE_STEPS}, "check_sizes": checks}


def _feature_width(model: PreTrainedModel, encoder: nn.Module | None) -> int | None:
    """The width of the features that a model runs on; several may be stacked to one."""
    configs = (model.config, getattr(model.config, "encoder_config", None))
    sizes = (getattr(config, name, None) for config in configs for name in _BINS)
    for size in (size for size in sizes if isinstance(size, int)):
        for width in (size * count for count in _STACKED):
            try:
                with torch.no_grad():
                    assert encoder is not None  # noqa: S101 (the caller has checked)
                    encoder(torch.zeros(1, _TRACE_STEPS, width, dtype=model.dtype))
            except RuntimeError:  # torch's, of shapes that do not fit
                continue
            return width
    return None


def _settings(model: PreTrainedModel, vocabulary: int) -> dict[str, int]:
    """Of a model of samples: those of a frame and of the shortest input, by its convolutions.

    The flow's verification compares the frames that follow from them with the model's own.
    """
    settings = {"vocabulary": vocabulary, "blank": int(model.config.pad_token_id or 0)}
    if model.main_input_name != "input_values":
        return settings
    stride, field = 1, 1
    for kernel, step in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        field += (kernel - 1) * stride
        stride *= step
    adapter = 1  # strided convolutions behind the encoder, padded at both ends
    if getattr(model.config, "add_adapter", False):
        adapter = model.config.adapter_stride**model.config.num_adapter_layers
    return {
        **settings,
        "samples_per_step": stride,
        "samples_per_frame": stride * adapter,
        "shortest": field,
    }


def _given(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The user's tensors, and the lengths from their mask."""
    name = "input_features" if "input_features" in inputs else "input_values"
    refuse_unused(inputs, (name, "attention_mask"))
    axes = ("sounds", "samples") if name == "input_values" else ("sounds", "steps", "width")
    values = tensor_of(inputs, name, axes)
    if inputs.get("attention_mask") is None:
        lengths = torch.full((values.shape[0],), values.shape[1])
    else:
        mask = tensor_of(inputs, "attention_mask", axes[:2]).to(torch.int64)
        lengths = mask.sum(dim=-1)
        behind = torch.arange(mask.shape[1]) >= lengths[:, None]
        if mask.shape != values.shape[:2] or (mask != (~behind).to(torch.int64)).any():
            raise UsageError(
                f"attention_mask {list(mask.shape)} is not ones before zeros for each of "
                f"{name} {list(values.shape)}",
                "Pad sounds at the end (padding_side='right'), or pass no mask.",
            )
    return {name: values, "lengths": lengths}
