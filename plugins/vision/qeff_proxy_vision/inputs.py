"""Preprocess and decode with the checkpoint's processor, for all families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensors
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UsageError
from qeff_proxy.families.sound import load_sound
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.request import Request, refuse_others

from qeff_proxy_vision.chat_template import try_template
from qeff_proxy_vision.images import open_image

__all__ = ["checked_tensors", "count_error", "decode", "preprocess", "prompts_and_images"]

#: The hints for a prompt with a token and no image or sound.
_NONE = {
    "image": "Give one with --image FILE (in Python images=[…]) for each place, or take the token "
    "out.",
    "sound": "Give one with --audio FILE (in Python audio=[…]) for each place, or take the token "
    "out.",
}
#: The prompt for sounds alone, where the processor has none.
_TRANSCRIBE = "Transcribe the input speech."


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Run the processor on prompts, images and sounds.

    A prompt without tokens of images or sounds is put into the processor's chat template, if there
    is one, after its images and sounds; ``options={"chat": True}`` or ``False`` decides this for
    all prompts. ``request.images`` is a list of images, assigned to the prompts in order, or a list
    of lists, one for each prompt; ``request.audio`` likewise of sounds. Sounds without prompts are
    to be transcribed, each for itself.

    Returns:
        The processor's output: ``input_ids`` and ``attention_mask [batch, length]`` int64, padded
        on the left, and the tensors of the images and sounds.

    Raises:
        UsageError: Images and image tokens do not match, an image or a sound cannot be read, or
            there is no processor for it.
    """
    if request.inputs is not None:
        return checked_tensors(request.inputs)
    hears, sees = (
        bool(getattr(processor, "audio_token", None)),
        hasattr(processor, "image_processor"),
    )
    takes = [*["audio"] * hears, *["images"] * (sees or not hears)]
    refuse_others(request, "prompts", *takes)
    if request.audio and not request.prompts:
        said = getattr(processor, "default_transcription_prompt", None) or _TRANSCRIBE
        sounds = [one if isinstance(one, list) else [one] for one in request.audio]
        request = replace(request, prompts=[said] * len(sounds), audio=sounds)
    if not request.prompts or processor is None:
        return None
    tokens = {
        "image": getattr(processor, "image_token", None) or "<image>",
        "sound": getattr(processor, "audio_token", None) or "<audio>",
    }
    video = getattr(processor, "video_token", None)
    if video and any(video in str(prompt) for prompt in request.prompts):
        raise UsageError(
            f"a prompt has a video token ({video}), and no videos are taken",
            "Give frames of the video as images (--image FILE, in Python images=[…]), with an "
            "image token for each.",
        )
    pairs = prompts_and_images(request, tokens["image"])
    sounds = _rows(request.prompts, request.audio, tokens["sound"], "sound")
    if request.images and not hasattr(processor, "image_processor"):
        raise UsageError(
            f"the checkpoint's {type(processor).__name__} does not process images",
            "Its image processor may need torchvision (pip install torchvision), or the "
            "checkpoint may lack preprocessor_config.json.",
        )
    if request.images and getattr(processor, "patch_size", 0) is None:
        raise UsageError(
            f"processor_config.json of the checkpoint gives its {type(processor).__name__} no "
            "patch_size, so it cannot count the image tokens",
            "Add patch_size (and vision_feature_select_strategy) with the values of config.json.",
        )
    prompts: list[str] = []
    for (text, row), heard in zip(pairs, sounds, strict=True):
        counts = {"image": len(row), "sound": len(heard)}
        prompts.append(_written(processor, request, text, counts, tokens, first=not prompts))
    images = [[open_image(image) for image in row] for _, row in pairs]
    arguments: dict[str, Any] = {"text": prompts, "return_tensors": "pt", "padding": True}
    if any(images):
        arguments["images"] = images
    if any(sounds):
        rate = _rate_of(processor)
        own = request.options.get("sampling_rate")
        arguments["audio"] = [load_sound(sound, rate, own) for row in sounds for sound in row]
        arguments["sampling_rate"] = rate
    with _padded_on_the_left(processor):
        try:
            tensors = processor(**arguments)
        except (ValueError, IndexError, StopIteration) as error:
            given = " and ".join(k for k, n in (("images", images), ("sounds", sounds)) if any(n))
            raise UsageError(
                f"the processor refuses the prompt and its {given or 'tokens'}: {error}",
                "Put one token into the prompt for each image and sound.",
            ) from error
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def _rate_of(processor: Any) -> int:
    """The sampling rate of a processor's sounds, in Hz."""
    parts = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    rates = (getattr(part, "sampling_rate", None) for part in parts)
    rate = next((rate for rate in rates if rate is not None), None)
    if rate is None:
        raise UsageError(
            f"the checkpoint's {type(processor).__name__} does not process sounds",
            "The checkpoint may lack preprocessor_config.json.",
        )
    return int(rate)


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[str] | None:
    """The texts of ``generated_ids`` without special tokens; ``None`` without a processor."""
    if processor is None or "generated_ids" not in outputs:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    texts: list[str] = tokenizer.batch_decode(outputs["generated_ids"], skip_special_tokens=True)
    return texts


def checked_tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a user passed instead of prompts, checked to be a processor's output.

    Args:
        inputs: Tensors, arrays or lists; ``None`` for missing ones.

    Raises:
        UsageError: A value is no tensor, or ids and mask do not match.
    """
    tensors = given_tensors(inputs)
    ids = tensors.get("input_ids")
    if ids is None:
        raise UsageError("there are no input_ids", "Pass the processor's output, or prompts.")
    if ids.dim() not in {1, 2} or ids.is_floating_point() or not ids.numel():
        raise UsageError(
            f"input_ids are {dtype_name(ids.dtype)} of shape {list(ids.shape)}",
            "They must be integers, [batch, length].",
        )
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise UsageError(
            f"attention_mask has shape {list(mask.shape)}, and input_ids have {list(ids.shape)}",
            "Pass the processor's output.",
        )
    if ids.dim() == 1:
        # Processors return one prompt without a batch axis.
        tensors = {name: value[None] for name, value in tensors.items()}
    return tensors


def prompts_and_images(request: Request, token: str) -> list[tuple[str, list[Any]]]:
    """Each prompt with its images.

    Args:
        request: Its images are assigned to the prompts in order, or are a list for each prompt.
        token: The image token in the text of a prompt.

    Raises:
        UsageError: A prompt is empty, or the images cannot be assigned to the prompts.
    """
    rows = _rows(request.prompts, request.images, token, "image")
    return list(zip(request.prompts, rows, strict=True))


def _rows(prompts: Sequence[str], items: Sequence[Any], token: str, what: str) -> list[list[Any]]:
    """Each prompt's images, or sounds."""
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", f"Say what to do with the {what}.")
    if len(items) == len(prompts) and all(isinstance(row, list | tuple) for row in items):
        return [list(row) for row in items]
    return _deal(list(prompts), list(items), token, what)


def _written(
    processor: Any,
    request: Request,
    prompt: str,
    counts: Mapping[str, int],
    tokens: Mapping[str, str],
    *,
    first: bool,
) -> str:
    """The text for the processor: the prompt itself, or the prompt in the chat template."""
    marked = any(token in prompt for token in tokens.values())
    chat = request.options.get("chat")
    if chat is None:
        template = bool(getattr(processor, "chat_template", None))
        chat = any(counts.values()) and not marked and template
    if chat:
        content = [{"type": "image"} for _ in range(counts["image"])]
        content += [{"type": "audio"} for _ in range(counts["sound"])]
        content.append({"type": "text", "text": prompt})
        message = [{"role": "user", "content": content}]
        render = partial(processor.apply_chat_template, message, add_generation_prompt=True)
        if first:
            try_template(render)
        text: str = render()
        return text
    for what, token in tokens.items():
        if prompt.count(token) != counts[what]:
            hint = f"Write {token} once for each {what}."
            raise count_error(prompt, token, counts[what], hint, what)
    return prompt


def count_error(prompt: str, token: str, images: int, hint: str, what: str = "image") -> UsageError:
    """The error for a prompt whose image tokens and images do not match.

    Args:
        prompt: The prompt.
        token: The image token in its text.
        images: The number of images.
        hint: What to do if there are images.
        what: ``"image"`` or ``"sound"``.
    """
    places = counted(prompt.count(token), f"{what} token")
    if images == 0:
        return UsageError(
            f"the prompt {prompt!r} has {places} ({token}), and no {what} is given", _NONE[what]
        )
    return UsageError(
        f"the prompt {prompt!r} has {places} ({token}) and {counted(images, what)}", hint
    )


def _deal(prompts: list[str], images: list[Any], token: str, what: str) -> list[list[Any]]:
    """Each prompt's images: one for each image token, or one if no prompt has image tokens."""
    if len(prompts) == 1:
        return [images]
    counts = [prompt.count(token) for prompt in prompts]
    if not any(counts) and len(images) == len(prompts):
        counts = [1] * len(prompts)
    if sum(counts) != len(images):
        places = counted(sum(counts), f"{what} token")
        raise UsageError(
            f"{len(prompts)} prompts have {places} ({token}), and there "
            f"{'is' if len(images) == 1 else 'are'} {counted(len(images), what)}",
            f"Give a list of {what}s for each prompt.",
        )
    remaining = iter(images)
    return [[next(remaining) for _ in range(count)] for count in counts]


@contextmanager
def _padded_on_the_left(processor: Any) -> Iterator[None]:
    """Pad on the left, with the end token if there is no pad token; restore the settings."""
    tokenizer = getattr(processor, "tokenizer", processor)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None
