"""Qwen2-Audio, whose model makes features of sounds in its ``forward``, by no method of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.audio_text import cut_with, decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy

__all__ = ["build_proxy", "decode", "features_of", "preprocess"]


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """As `qeff_proxy_vision.audio_text` does it, with `features_of`."""
    return cut_with(features_of, model, embedding, lm_head, kind, options)


def features_of(
    model: Any, input_features: torch.Tensor, feature_attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Spectra ``[sounds, bins, frames]`` to features ``[sounds, rows, hidden]``."""
    model = getattr(model, "model", model)
    tower = model.audio_tower
    heard = feature_attention_mask.to(torch.float32).sum(
        -1
    )  # of which any compiler takes the floor
    lengths, counts = tower._get_feat_extract_output_lengths(heard)  # noqa: SLF001 (as the model does)
    frames = torch.arange((input_features.shape[-1] - 2) // 2 + 1)
    # As transformers' mask of the padding, in operators that every compiler takes.
    unseen = (frames >= lengths[:, None]).to(input_features.dtype)
    mask = (unseen * torch.finfo(input_features.dtype).min)[:, None, None]
    hidden = tower(input_features, attention_mask=mask).last_hidden_state
    features = model.multi_modal_projector(hidden)
    kept = torch.arange(features.shape[1]) < counts[:, None]
    return {"last_hidden_state": features, "attention_mask": kept}
