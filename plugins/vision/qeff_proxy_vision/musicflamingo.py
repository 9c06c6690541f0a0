"""Music Flamingo, whose features of a sound turn with the time at which they are heard.

The model counts the windows of each sound by the runs of its tokens among the token ids. Here each
sound is one window, so that every time begins at zero; a sound of several windows is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel
from transformers.models.musicflamingo.modeling_musicflamingo import apply_rotary_time_emb

from qeff_proxy_vision.audio_text import cut_with, decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy

__all__ = ["build_proxy", "decode", "features_of", "preprocess"]

#: Frames of a spectrum that become a row of features.
_FRAMES = 4


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """As `qeff_proxy_vision.audio_text` does it, with `features_of`."""
    return cut_with(features_of, model, embedding, lm_head, kind, options, apart=True)


def features_of(
    model: Any, input_features: torch.Tensor, input_features_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Spectra ``[sounds, bins, frames]`` to features ``[sounds, rows, hidden]`` and a mask."""
    tower = model.audio_tower
    outputs = tower(input_features, input_features_mask=input_features_mask, return_dict=True)
    hidden = outputs.last_hidden_state
    rows = torch.arange(hidden.shape[1], dtype=torch.float32)
    times = (rows * model.config.audio_frame_step * _FRAMES)[None].expand(hidden.shape[0], -1)
    cos, sin = model.pos_emb(times, seq_len=hidden.shape[-2])
    features = model.multi_modal_projector(apply_rotary_time_emb(hidden, cos, sin))
    lengths = input_features_mask.sum(-1).to(torch.long)
    _, counts = tower._get_feat_extract_output_lengths(lengths)  # noqa: SLF001 (as the model does)
    return {
        "last_hidden_state": features,
        "attention_mask": torch.arange(features.shape[1]) < counts[:, None],
    }
