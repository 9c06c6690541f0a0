"""The ``image-text-to-text`` flow: the vision part once, then prefill and decode steps.

To verify a cut, a padded batch with an image is run through the parts, and through the uncut model
with its own cache and masks, and the logits are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.errors import CutError, UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.causal_lm import shrunk_windows
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.flows.generation.generate import generate_ids
from qeff_proxy.parts import Part, Proxy
from qeff_proxy.request import Request, refuse_unused
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_prompt import ImagePrompt
from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.images import DRAWING, QUESTION
from qeff_proxy_vision.proxy import VisionProxy

__all__ = ["ImageTextFlow"]

_TEXT_INPUTS = ("input_ids", "attention_mask")
_NEW_TOKENS = 2  # decode steps of the verification
_WINDOW = 5  # a sliding window shorter than the prompt, so that it has an effect


class ImageTextFlow:
    """Images and text in, text out, through transformers' generation loop."""

    def verify(
        self, model: PreTrainedModel, proxy: VisionProxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the parts with the model on a batch with an image.

        Raises:
            CutError: The parts cannot be run, or compute other logits.
        """
        if not isinstance(proxy, VisionProxy):
            raise CutError(
                f"the proxy of {type(model).__name__} has no sample to be verified with",
                "Its plugin must build a qeff_proxy_vision.proxy.VisionProxy.",
            )
        sample = {name: to_array(tensor) for name, tensor in proxy.sample().items()}
        generator = np.random.default_rng(0)
        new = generator.integers(1, int(sample["input_ids"].max()), (2, _NEW_TOKENS))
        new = new[: sample["input_ids"].shape[0]]
        # A model may generate tokens whose embedding it does not look up.
        special = list(ImageSettings.from_json(proxy.settings["image"]).looked_up_as)
        new[-1, : len(special)] = special[:_NEW_TOKENS]
        with shrunk_windows(model, _WINDOW):
            expected = proxy.reference(model, sample, new)
            with parts_must_run(model, sites):
                actual, longest = _proxy_logits(proxy, sample, new)
        ones = np.ones_like(new)
        padding = np.concatenate([sample["attention_mask"], ones], axis=1)
        return check_equal(
            model, sites, expected, actual, padding, output="logit", scanned=longest is not None
        )

    def example_request(
        self,
        export: Export,  # noqa: ARG002 (part of the protocol)
        processor: Any,
        proxy: Callable[[], Proxy],
    ) -> Request:
        """A drawing and a question; noise and random tokens if no processor takes images."""
        if any(hasattr(processor, name) for name in ("image_processor", "process")):
            token = getattr(processor, "image_token", None)
            templated = not token or getattr(processor, "chat_template", None)
            question = QUESTION if templated else f"{token} {QUESTION}"
            return Request(prompts=(question,), images=(DRAWING,))
        live = proxy()
        if not isinstance(live, VisionProxy):
            raise UsageError(
                "this model has no processor for images, and no input was given",
                "Pass a processor's output: inputs={'input_ids': …, 'pixel_values': …}.",
            )
        return Request(inputs=live.sample())

    def run(self, job: Job) -> dict[str, Any]:
        """Generate.

        Returns:
            ``generated_ids [prompts, tokens]`` int64, and ``perf_metrics``.

        Raises:
            UsageError: Images and prompt do not match, the prompt is too long, or the export is a
                stub.
        """
        steps = tuple(part for part in job.export.parts if part.name != "vision")

        runs = count()

        def run_vision(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            outputs = job.sessions["vision"].run(feeds)
            if job.recorder is not None:
                job.recorder.step("prefill", next(runs), "vision", feeds, outputs, past_length=0)
            return outputs

        tensors = {name: to_array(torch.as_tensor(value)) for name, value in job.tensors.items()}
        settings = ImageSettings.from_json(job.export.settings["image"])
        takes = [*_TEXT_INPUTS, *_pixels(settings, job.export.parts)]
        refused = settings.refused
        given = {n: v for n, v in tensors.items() if n in refused or not _tells_of_images(n)}
        refuse_unused(given, takes)
        prompt = ImagePrompt(settings, tensors, _takes_pixels(job.export.parts), run_vision)
        generated = generate_ids(job, steps, prompt)
        return {"generated_ids": generated.ids, "perf_metrics": generated.perf}


def _proxy_logits(
    proxy: VisionProxy, sample: Mapping[str, Array], new: Array
) -> tuple[Array, int | None]:
    """Logits of the parts, ``[batch, sequence, vocabulary]``, and their longest step."""
    parts = [_shrunk(part) for part in proxy.parts]
    sessions = {part.name: TorchSession(part) for part in parts}
    takes_pixels = _takes_pixels(parts)
    settings = ImageSettings.from_json(proxy.settings["image"])
    prompt = ImagePrompt(settings, sample, takes_pixels, sessions[takes_pixels.name].run)
    engine = CausalEngine(
        [part for part in parts if part.name != "vision"], sessions, supplier=prompt
    )
    ids = np.concatenate([sample["input_ids"], new], axis=1)
    padding = np.concatenate([sample["attention_mask"], np.ones_like(new)], axis=1)
    pieces: list[Array] = []
    cache = None
    prompt_length = sample["input_ids"].shape[1] if engine.longest_step is None else 0
    for index, (start, stop) in enumerate(_steps(prompt_length, ids.shape[1])):
        logits, cache = engine.step(
            StepId("prefill", index), ids[:, start:stop], padding[:, :stop], cache
        )
        pieces.append(logits.astype(np.float32))
    return np.concatenate(pieces, axis=1), engine.longest_step


def _takes_pixels(parts: Iterable[PartLike]) -> PartLike:
    """The part that takes the images: ``vision``, or the part that contains it."""
    by_name = {part.name: part for part in parts}
    return next(by_name[name] for name in ("vision", "body", "model") if name in by_name)


def _pixels(settings: ImageSettings, parts: Iterable[PartLike]) -> list[str]:
    """The names of the image inputs, and of the inputs that give the images' positions."""
    names = [spec.name for spec in _takes_pixels(parts).inputs]
    if settings.inputs:
        names = list(settings.inputs)
    blocks = settings.blocks.tensor if settings.blocks is not None else None
    if settings.geometry is not None:
        names = [*names, *settings.geometry.tensors]
    return [*names, *(name for name in (settings.index, blocks) if name is not None)]


def _tells_of_images(name: str) -> bool:
    """Whether this is a further output of image processors, which the model may not need."""
    return (name.startswith(("image_", "pixel_")) and not name.endswith("_videos")) or (
        name == "mm_token_type_ids"
    )


def _steps(prompt: int, total: int) -> Iterable[tuple[int, int]]:
    """The prompt at once, then one position at a time."""
    if prompt:
        yield 0, prompt
    for start in range(prompt, total):
        yield start, start + 1


def _shrunk(part: Part) -> Part:
    """The part with the masks for the model's shrunk windows."""
    masks = tuple(
        mask if mask.size is None else replace(mask, size=min(mask.size, _WINDOW))
        for mask in part.masks
    )
    return replace(part, masks=masks)
