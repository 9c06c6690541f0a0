"""Voxtral Realtime, which hears a sound while it writes: features are added to each token.

Its tower is causal, so a sound gives at once what it gives piece by piece. How many tokens the
text is behind the sound is in the body: what the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UsageError
from qeff_proxy.families.sound import load_sound
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.added_sound import FEATURES, add_sound
from qeff_proxy_vision.inputs import checked_tensors, decode
from qeff_proxy_vision.language import cut_language
from qeff_proxy_vision.proxy import VisionProxy

__all__ = ["build_proxy", "decode", "preprocess"]

_DELAY = "num_delay_tokens"


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A part of sounds, and the language model, whose body takes their features."""
    config, inner = model.config, model.model
    delay, frames = int(config.default_num_delay_tokens), int(config.audio_length_per_tok)
    timed = _Timed(inner.language_model, inner.time_embedding, delay)
    copied = replace_modules(model, {"model.language_model": timed})
    text = cut_language(copied, embedding, lm_head, kind, options)
    bins, constants = int(config.audio_config.num_mel_bins), {_DELAY: delay}
    return add_sound(text, _Tower(inner), dtype_name(model.dtype), bins, frames, constants)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """What the processor makes of sounds: a prompt of its own, and spectra."""
    if request.inputs is not None:
        return checked_tensors(request.inputs)
    refuse_others(request, "audio")
    if not request.audio or processor is None:
        return None
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is None:
        raise UsageError(
            f"the checkpoint's {type(processor).__name__} does not process sounds",
            "It needs mistral-common (pip install mistral-common[audio]).",
        )
    rate, own = int(extractor.sampling_rate), request.options.get("sampling_rate")
    sounds = [load_sound(sound, rate, own) for sound in request.audio]
    tensors = processor(audio=sounds, sampling_rate=rate, return_tensors="pt")
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


class _Timed(PreTrainedModel):  # type: ignore[misc]
    """The language model, told how many tokens it is behind the sound."""

    def __init__(self, inner: PreTrainedModel, time_embedding: nn.Module, delay: int) -> None:
        super().__init__(inner.config)
        self.inner = inner
        self.embed_tokens = inner.embed_tokens
        self.time_embedding = time_embedding
        self.delay = delay

    def forward(
        self, inputs_embeds: torch.Tensor, past_key_values: Any = None, **others: Any
    ) -> Any:
        """As the language model."""
        time = inputs_embeds.new_full((1,), self.delay)
        return self.inner(
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            t_cond=self.time_embedding(time)[None],
            **others,
        )


class _Tower(nn.Module):
    """Spectra to features."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = replace_modules(model, {"language_model": nn.Identity()})

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, bins, frames]`` to ``audio_features [batch, tokens, hidden]``."""
        made = self.model.get_audio_features(input_features, use_cache=False, return_dict=True)
        return {FEATURES: made.pooler_output}
