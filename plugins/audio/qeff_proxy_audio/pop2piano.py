"""Pop2Piano: a T5 that runs on spectra, behind a row that says in whose style to play.

The row is part of the exported encoder: the option ``composer`` says which, as the argument of that
name does for transformers' own ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Proxy, TensorSpec
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_audio import any_speech
from qeff_proxy_audio.any_speech import locate_lm_head

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

_USUAL = "composer1"  # of `generate`


@hookimpl
def locate_embedding() -> Site:
    """The token embedding, which the decoder shares with the encoder."""
    return Site("shared")


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> Proxy | None:
    """As of other recognizers, with the row of the composer in front of the spectra.

    Raises:
        UnsupportedModelError: The checkpoint names no composers.
        UsageError: The option is none of them.
    """
    tokens = getattr(model.generation_config, "composer_to_feature_token", None)
    if not tokens:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no composer_to_feature_token in its generation config",
            "Put the checkpoint's generation_config.json beside it.",
        )
    composer = options.get("composer", _USUAL)
    if composer not in tokens:
        raise UsageError(f"composer is {composer!r}", f"Give one of {', '.join(tokens)}.")
    number = tokens[composer] - min(tokens.values())
    shape = ("batch", "steps", int(model.config.d_model))
    sound = TensorSpec("input_features", dtype_name(model.dtype), shape)
    edges = {"check_sizes": ({"steps": 7}, {"steps": 300}), "trace_sizes": {"steps": 40}}
    before = _Conditioned(model.mel_conditioner, number)
    proxy = any_speech.proxy_of(
        model, embedding, lm_head, kind, sound, edges, entry="inputs_embeds", before=before
    )
    settings = {} if proxy is None else {**proxy.settings, "composer": composer}
    return proxy and replace(proxy, settings=settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """The user's ``input_features [sounds, steps, width]`` and ``lengths``.

    Raises:
        UsageError: There is a sound instead: its extractor divides it by the beats.
    """
    if request.inputs is None:
        raise UsageError(
            "Pop2Piano's sounds are divided by their beats, which qeff-proxy does not look for",
            "Give the input_features and attention_mask of Pop2PianoFeatureExtractor (inputs=).",
        )
    return any_speech.preprocess(processor, request)


@hookimpl
def decode() -> None:
    """The tokens stand for notes, which Pop2PianoTokenizer makes of them with the beats."""


class _Conditioned(nn.Module):
    """Spectra behind the row of a composer."""

    def __init__(self, conditioner: nn.Module, number: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.number = number

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """``[batch, steps, hidden]`` to ``[batch, 1 + steps, hidden]``."""
        number = torch.full(spectra.shape[:1], self.number, device=spectra.device)
        rows: torch.Tensor = self.conditioner(spectra, number, 0)
        return rows
