"""The ``image-text-to-text`` flow: the vision part once, then prefill and decode steps.

To verify a cut, a padded batch with an image is run through the parts, and through the uncut model
with its own cache and masks, and the logits are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.errors import CheckpointError, CutError, ProxyError, UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.causal_lm import check_steps, shrunk_windows
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.flows.generation.generate import generate_ids
from qeff_proxy.parts import Part, Proxy
from qeff_proxy.request import Request, refuse_unused
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.added_sound import ADDED, AddedSound, job_within
from qeff_proxy_vision.image_prompt import ImagePrompt, Prompts
from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.images import DRAWING, QUESTION
from qeff_proxy_vision.proxy import VisionProxy

__all__ = ["ImageTextFlow"]

_TEXT_INPUTS = ("input_ids", "attention_mask")
#: The part that takes each kind of input; what names of further outputs of processors begin with.
_TOWERS = {"image": "vision", "sound": "audio"}
_FURTHER = {
    "image": ("image_", "pixel_"),
    "sound": ("audio_", "num_audio_", "feature_", "input_features_", "padding_mask"),
}
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
        special = [token for one in _settings(proxy.settings) for token in one.looked_up_as]
        new[-1, : len(special)] = special[:_NEW_TOKENS]
        # A tower of sounds may have windows of its own, which are as they are.
        heard = {"sound", ADDED} & set(proxy.settings)
        windowed = model.get_decoder() if heard else model
        with shrunk_windows(windowed, _WINDOW):
            expected = proxy.reference(model, sample, new)
            with parts_must_run(model, sites):
                actual, longest = _proxy_logits(proxy, sample, new)
        ones = np.ones_like(new)
        padding = np.concatenate([sample["attention_mask"], ones], axis=1)
        try:
            return check_equal(
                model, sites, expected, actual, padding, output="logit", scanned=longest is not None
            )
        except CutError:
            if longest is not None:  # the first row is a text
                row = (slice(0, 1), padding[0] != 0)
                ids = np.concatenate([sample["input_ids"], new], axis=1)
                check_steps(model, ids[row], expected[row], actual[row], grows=True)
            raise

    def check_processor(
        self, proxy: Proxy, processor: Any, preprocess: Callable[[Request], Any]
    ) -> None:
        """See that the processor counts the image tokens as the tower does: of a drawing.

        Raises:
            CheckpointError: It does not.
        """
        settings = next((one for one in _settings(proxy.settings) if one.what == "image"), None)
        if settings is None or settings.geometry is not None or not hasattr(processor, "tokenizer"):
            return  # no images, or of a size that is chosen
        written = bool(getattr(processor, "chat_template", None))  # by the template
        token = "" if written else getattr(processor, "image_token", "")
        try:
            tensors = preprocess(Request(prompts=(f"{token}{QUESTION}",), images=(DRAWING,)))
        except ProxyError:  # said where an image is given
            return
        arrays = {name: to_array(tensor) for name, tensor in tensors.items()}
        try:
            ImagePrompt(settings, arrays, _takes_pixels(proxy.parts, "image"), None).check_places()
        except UsageError as error:
            raise CheckpointError(
                f"the checkpoint's {type(processor).__name__} does not fit its tower: "
                f"{error.problem}",
                "Compare the sizes, patch_size and the number of image tokens in "
                "processor_config.json (or preprocessor_config.json) with those in config.json.",
            ) from error

    def example_request(
        self,
        export: Export,
        processor: Any,
        proxy: Callable[[], Proxy],
    ) -> Request:
        """A drawing, two tones and a question; noise and random tokens without a processor."""
        hears = export.settings.get("sound")
        fixed = hears is not None and hears["geometry"] is not None
        images = any(hasattr(processor, name) for name in ("image_processor", "process"))
        sounds = hears is not None and bool(getattr(processor, "audio_token", None))
        if (images or sounds) and not fixed:
            question = QUESTION
            if not getattr(processor, "chat_template", None):
                token = getattr(processor, "image_token", None) if images else None
                heard = processor.audio_token if sounds else None
                question = " ".join(filter(None, (token, heard, QUESTION)))
            drawings, tones = (DRAWING,) * images, (_tones(),) * sounds
            return Request(prompts=(question,), images=drawings, audio=tones)
        live = proxy()
        if not isinstance(live, VisionProxy):
            raise UsageError(
                "this model has no processor for images or sounds, and no input was given",
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
        steps = tuple(part for part in job.export.parts if part.name not in _TOWERS.values())

        def run_tower(name: str, runs: Iterator[int], feeds: Mapping[str, Array]) -> Any:
            outputs = job.sessions[name].run(feeds)
            if job.recorder is not None:
                job.recorder.step("prefill", next(runs), name, feeds, outputs, past_length=0)
            return outputs

        tensors = {name: to_array(torch.as_tensor(value)) for name, value in job.tensors.items()}
        if ADDED in job.export.settings:
            tower, run = job.export.parts[0], partial(run_tower, "audio", count())
            sound = AddedSound(tower, tensors, job.export.settings[ADDED], run)
            generated = generate_ids(job_within(job, sound.tokens), steps, sound)
            return {"generated_ids": generated.ids, "perf_metrics": generated.perf}
        kinds = _settings(job.export.settings)
        takes = [*_TEXT_INPUTS, *(n for one in kinds for n in _pixels(one, job.export.parts))]
        refused = [name for one in kinds for name in one.refused]
        given = {n: v for n, v in tensors.items() if n in refused or not _is_passed_over(n, kinds)}
        refuse_unused(given, takes)
        prompts = [
            ImagePrompt(
                one,
                tensors,
                _takes_pixels(job.export.parts, one.what),
                partial(run_tower, _TOWERS[one.what], count()),
            )
            for one in kinds
        ]
        generated = generate_ids(job, steps, Prompts(prompts))
        return {"generated_ids": generated.ids, "perf_metrics": generated.perf}


def _tones() -> Array:
    """Two seconds of sound, at any rate that is usual for speech."""
    seconds = np.arange(32_000) / 16_000
    tones = np.sin(2 * np.pi * (220 + 110 * seconds) * seconds) * np.cos(np.pi * seconds) ** 2
    return np.asarray(0.3 * tones, np.float32)


def _proxy_logits(
    proxy: VisionProxy, sample: Mapping[str, Array], new: Array
) -> tuple[Array, int | None]:
    """Logits of the parts, ``[batch, sequence, vocabulary]``, and their longest step."""
    parts = [_shrunk(part) for part in proxy.parts]
    sessions = {part.name: TorchSession(part) for part in parts}
    prompts: list[Any] = []
    if ADDED in proxy.settings:
        added = proxy.settings[ADDED]
        prompts.append(AddedSound(parts[0], sample, added, sessions[parts[0].name].run))
    for settings in _settings(proxy.settings):
        tower = _takes_pixels(parts, settings.what)
        prompts.append(ImagePrompt(settings, sample, tower, sessions[tower.name].run))
    engine = CausalEngine(
        [part for part in parts if part.name not in _TOWERS.values()],
        sessions,
        supplier=Prompts(prompts),
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


def _settings(settings: Mapping[str, Any]) -> list[ImageSettings]:
    """How images, and sounds, are used, in the order of the towers."""
    return [ImageSettings.from_json(settings[kind]) for kind in _TOWERS if kind in settings]


def _takes_pixels(parts: Iterable[PartLike], what: str) -> PartLike:
    """The part that takes the images, or sounds: the tower, or the part that contains it."""
    by_name = {part.name: part for part in parts}
    return next(by_name[name] for name in (_TOWERS[what], "body", "model") if name in by_name)


def _pixels(settings: ImageSettings, parts: Iterable[PartLike]) -> list[str]:
    """The names of the image inputs, and of the inputs that give the images' positions."""
    names = [spec.name for spec in _takes_pixels(parts, settings.what).inputs]
    if settings.inputs:
        names = list(settings.inputs)
    blocks = settings.blocks.tensor if settings.blocks is not None else None
    if settings.geometry is not None:
        names = [*names, *settings.geometry.tensors]
    more = (settings.index, blocks, settings.counted)
    return [*names, *(name for name in more if name is not None)]


def _is_passed_over(name: str, kinds: Iterable[ImageSettings]) -> bool:
    """Whether this is a further output of processors, which the model may not need."""
    known = tuple(start for one in kinds for start in _FURTHER[one.what])
    return (name.startswith(known) and not name.endswith("_videos")) or name == "mm_token_type_ids"


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
