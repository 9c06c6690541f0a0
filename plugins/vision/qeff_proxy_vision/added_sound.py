"""A sound whose features are added to the embeddings of all tokens, of the new ones too.

Each token has a row of features, by its place in the padded prompt; when there is none for a next
token, the sound is over. The body takes them as ``added_features [batch, query, hidden]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.flow import Job
from qeff_proxy.parts import Part, Proxy, TensorSpec
from qeff_proxy.request import refuse_unused
from qeff_proxy.session.part_like import PartLike
from torch import nn

from qeff_proxy_vision.audio_text import SOUND_FLOW
from qeff_proxy_vision.joined_graph import join_whole
from qeff_proxy_vision.proxy import VisionProxy
from qeff_proxy_vision.reference import generated_logits

__all__ = ["ADDED", "FEATURES", "AddedSound", "add_sound", "job_within"]

#: The settings of such a model: ``frames`` for each token, and inputs that must be ``constants``.
ADDED = "added_sound"
#: What the part of sounds makes.
FEATURES = "audio_features"
_ADDED_FEATURES = "added_features"
_PROMPT, _MORE = 5, 4  # tokens of the prompt to verify with, and of its sound behind it
_TEXT = ("input_ids", "attention_mask")


class AddedSound:
    """The sounds of a batch: a `qeff_proxy.flows.causal_engine.Supplier`.

    Args:
        tower: The part from ``input_features`` to ``audio_features [batch, tokens, hidden]``.
        tensors: Its input, and ``input_ids``.
        settings: Those of `ADDED`.
        run: Runs the tower. It is called once.

    Raises:
        UsageError: The sounds are no whole tokens, or not one for each prompt.
    """

    def __init__(
        self,
        tower: PartLike,
        tensors: Mapping[str, Array],
        settings: Mapping[str, Any],
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    ) -> None:
        (spec,) = tower.inputs
        constants = settings["constants"]
        refuse_unused(tensors, (*_TEXT, spec.name, *constants))
        for name, value in constants.items():
            if name in tensors and (np.asarray(tensors[name]) != value).any():
                raise UsageError(
                    f"{name} is {tensors[name].tolist()}, and the export has {value} in it",
                    f"Give {value}, or leave it out.",
                )
        sounds, prompts = tensors.get(spec.name), len(tensors["input_ids"])
        if sounds is None or sounds.ndim != len(spec.shape) or len(sounds) != prompts:
            found = "missing" if sounds is None else f"of shape {list(sounds.shape)}"
            raise UsageError(
                f"{spec.name} is {found}, for {prompts} prompts",
                f"Give {list(spec.shape)}, one for each prompt, as the processor does.",
            )
        if sounds.shape[-1] % settings["frames"]:
            raise UsageError(
                f"a sound of {sounds.shape[-1]} frames is not one of whole tokens, of "
                f"{settings['frames']} frames each",
                "Pad it with silence, as the processor does.",
            )
        self.tokens = sounds.shape[-1] // settings["frames"]
        self._features = run({spec.name: sounds.astype(numpy_dtype(spec.dtype))})[FEATURES]

    def supply(
        self, part: PartLike, known: Mapping[str, Array], padding: Array
    ) -> dict[str, Array]:
        """The rows of a step, for the part that takes them."""
        if _ADDED_FEATURES not in {spec.name for spec in part.inputs}:
            return {}
        batch, query = known["input_ids"].shape
        if padding.shape[1] > self.tokens:
            raise UsageError(
                f"the sound has {self.tokens} tokens, and this is one more",
                "Give a longer sound, or ask for fewer tokens.",
            )
        rows = self._features[:, padding.shape[1] - query : padding.shape[1]]
        return {
            _ADDED_FEATURES: rows.repeat(batch // len(rows), axis=0)
        }  # beams of a prompt are together

    def chunk_end(self, start: int, stop: int) -> int:  # noqa: ARG002
        """A chunk may end anywhere."""
        return stop


def job_within(job: Job, tokens: int) -> Job:
    """The job, whose new tokens end with the sound; without a number of them, they are as many.

    Raises:
        UsageError: The prompt is as long as the sound.
    """
    length, own = job.tensors["input_ids"].shape[1], job.settings.get("generation_config")
    if length >= tokens:
        raise UsageError(
            f"the prompt has {length} tokens, and the sound {tokens}", "Give a longer sound."
        )
    settings = {name: value for name, value in job.settings.items() if name != "max_length"}
    asked = (
        settings.get("max_new_tokens"),
        (job.settings.get("max_length") or 0) - length,
        getattr(own, "max_new_tokens", None),
    )
    new = next((number for number in asked if number is not None and number > 0), tokens)
    return replace(job, settings={**settings, "max_new_tokens": min(new, tokens - length)})


def add_sound(
    text: Proxy,
    tower: nn.Module,
    dtype: str,
    bins: int,
    frames: int,
    constants: Mapping[str, int],
) -> VisionProxy:
    """The proxy of a model whose body gets a row of features of the sound for each token.

    Args:
        text: The cut language model, with the kind of the final proxy (`marked_text`).
        tower: ``input_features [batch, bins, frames]`` to ``audio_features [batch, tokens,
            hidden]``.
        dtype: Of both.
        bins: Of the spectra.
        frames: For each token.
        constants: Inputs of the model that are constants of the body, and what they are there.
    """
    parts = tuple(_with_features(part) if part.name == "body" else part for part in text.parts)
    if text.kind != "split":
        parts = join_whole(parts, stub=text.kind == "stub")
    sound = TensorSpec("input_features", dtype, ("batch", bins, "frames"))
    rows, width = int(text.settings["embedding_rows"]), int(text.settings["hidden_size"])
    part = Part(
        "audio",
        tower,
        (sound,),
        (TensorSpec(FEATURES, dtype, ("batch", "tokens", width)),),
        "audio",
        trace_sizes={"frames": 7 * frames},
        check_sizes=({"frames": 3 * frames}, {"frames": 12 * frames}),
    )

    def sample() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, rows, (2, _PROMPT), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        shape = (2, bins, (_PROMPT + _MORE) * frames)
        noise = torch.randn(shape, generator=generator)
        return {"input_ids": ids, "attention_mask": mask, sound.name: noise}

    settings = {**text.settings, ADDED: {"frames": frames, "constants": dict(constants)}}
    return VisionProxy(text.kind, SOUND_FLOW, (part, *parts), settings, sample, generated_logits)


def _with_features(body: Part) -> Part:
    """A body that adds the rows to its embeddings."""
    embeds = body.inputs[0]
    more = replace(embeds, name=_ADDED_FEATURES)
    return replace(body, module=_Adding(body.module), inputs=(embeds, more, *body.inputs[1:]))


class _Adding(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(
        self, inputs_embeds: torch.Tensor, added_features: torch.Tensor, **tensors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """As the body."""
        outputs: dict[str, torch.Tensor] = self.body(
            inputs_embeds=inputs_embeds + added_features, **tensors
        )
        return outputs
