"""Recognizers with a CTC head: Wav2Vec2, HuBERT, WavLM, Data2VecAudio.

The input is samples, so there is no token embedding; the head is cut off with its bias. The body is
one graph from samples to hidden states, for any number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError
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

_HEAD = "lm_head"
# Frames of the sound that is traced, and of those that are checked.
_TRACE_FRAMES = 12


@hookimpl
def locate_embedding() -> Absent:
    """There is none."""
    return Absent("samples of sound go in, not token ids")


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site | Absent:
    """``lm_head``, a linear layer with a bias."""
    if _HEAD not in dict(model.named_children()):
        return Absent(f"{type(model).__name__} has no CTC head")
    return Site(_HEAD)


@hookimpl
def build_proxy(model: PreTrainedModel, lm_head: Site | Absent, kind: Kind) -> Proxy | None:
    """Body and head; one graph for ``stub`` and ``whole``."""
    if isinstance(lm_head, Absent) or model.base_model is model:
        return None
    head = model.get_submodule(lm_head.module)
    hidden_size, vocabulary = int(head.weight.shape[1]), int(head.weight.shape[0])
    dtype = dtype_name(model.dtype)
    samples = TensorSpec("input_values", dtype, ("batch", "samples"))
    hidden = TensorSpec("last_hidden_state", dtype, ("batch", "frames", hidden_size))
    logits = TensorSpec("logits", dtype, ("batch", "frames", vocabulary))
    settings = _settings(model, vocabulary)
    sizes = {"samples": settings["shortest"] + settings["samples_per_frame"] * _TRACE_FRAMES}
    parts: tuple[Part, ...]
    if kind == "split":
        sizes_of_head = {"frames": _TRACE_FRAMES}
        parts = (
            Part("body", CtcPart(model, None), (samples,), (hidden,), "body", trace_sizes=sizes),
            Part("lm_head", HeadPart(head), (hidden,), (logits,), "vocabulary", (), sizes_of_head),
        )
    else:
        whole = CtcPart(model, HeadStub() if kind == "stub" else head)
        spec = TensorSpec("logits", dtype, hidden.shape if kind == "stub" else logits.shape)
        parts = (Part("model", whole, (samples,), (spec,), "model", trace_sizes=sizes),)
    return Proxy(kind, "ctc", parts, settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """``input_values [sounds, samples]``, padded with zeros at the end, and ``lengths``."""
    if request.inputs is not None:
        return _given(request.inputs)
    extractor = feature_extractor_of(processor)
    rate = int(extractor.sampling_rate)
    rows = []
    for samples in sounds_of(request, rate):
        values = extractor(samples, sampling_rate=rate, return_tensors="np")["input_values"]
        rows.append(np.asarray(values[0], dtype=np.float32))
    values = np.zeros((len(rows), max(len(row) for row in rows)), np.float32)
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_values": torch.from_numpy(values), "lengths": lengths}


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
    """``input_values`` to hidden states, or with a head to logits.

    Args:
        model: The model with its head; only its base model is run.
        head: The module that follows it, or ``None``.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = model.base_model
        self.head = head

    def forward(self, input_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, samples]`` to ``last_hidden_state`` or ``logits``, ``[batch, frames, …]``."""
        # Rows are never padded, so every frame attends to all others.
        with provide_masks(self.encoder, {"bidirectional": None}):
            hidden = self.encoder(input_values).last_hidden_state
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


def _settings(model: PreTrainedModel, vocabulary: int) -> dict[str, int]:
    """Samples of a frame and of the shortest input, from the convolutions at both ends.

    The flow's verification compares the frames that follow from them with the model's own.
    """
    stride, field = 1, 1
    for kernel, step in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        field += (kernel - 1) * stride
        stride *= step
    adapter = 1  # strided convolutions behind the encoder, padded at both ends
    if getattr(model.config, "add_adapter", False):
        adapter = model.config.adapter_stride**model.config.num_adapter_layers
    return {
        "vocabulary": vocabulary,
        "samples_per_step": stride,
        "samples_per_frame": stride * adapter,
        "shortest": field,
        "blank": int(model.config.pad_token_id or 0),
    }


def _given(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The user's tensors, and the lengths from their mask."""
    refuse_unused(inputs, ("input_values", "attention_mask"))
    values = tensor_of(inputs, "input_values", ("sounds", "samples"))
    if inputs.get("attention_mask") is None:
        lengths = torch.full((values.shape[0],), values.shape[1])
    else:
        mask = tensor_of(inputs, "attention_mask", ("sounds", "samples")).to(torch.int64)
        lengths = mask.sum(dim=-1)
        behind = torch.arange(mask.shape[1]) >= lengths[:, None]
        if mask.shape != values.shape or (mask != (~behind).to(torch.int64)).any():
            raise UsageError(
                f"attention_mask {list(mask.shape)} is not ones before zeros for each of "
                f"input_values {list(values.shape)}",
                "Pad sounds at the end (padding_side='right'), or pass no mask.",
            )
    return {"input_values": values, "lengths": lengths}
