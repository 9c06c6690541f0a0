"""Preprocess and decode with the checkpoint's processor, for all families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensors
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.request import Request, refuse_others

from qeff_proxy_vision.chat_template import try_template
from qeff_proxy_vision.images import open_image

__all__ = ["checked_tensors", "count_error", "decode", "preprocess", "prompts_and_images"]

#: The hint for a prompt with an image token and no image.
NO_IMAGE = (
    "Give one with --image FILE (in Python images=[…]) for each place, or take the token out."
)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Run the processor on prompts and images.

    A prompt without image tokens is put into the processor's chat template, if there is one, after
    its images; ``options={"chat": True}`` or ``False`` decides this for all prompts.
    ``request.images`` is a list of images, assigned to the prompts in order, or a list of lists,
    one for each prompt.

    Returns:
        The processor's output: ``input_ids`` and ``attention_mask [batch, length]`` int64, padded
        on the left, and the tensors of the images.

    Raises:
        UsageError: Images and image tokens do not match, an image cannot be read, or there is no
            processor for images.
    """
    if request.inputs is not None:
        return checked_tensors(request.inputs)
    refuse_others(request, "prompts", "images")
    if not request.prompts or processor is None:
        return None
    token = getattr(processor, "image_token", None) or "<image>"
    pairs = prompts_and_images(request, token)
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
    prompts = [
        _written(processor, request, text, len(row), token, first=not index)
        for index, (text, row) in enumerate(pairs)
    ]
    images = [[open_image(image) for image in row] for _, row in pairs]
    arguments: dict[str, Any] = {"text": prompts, "return_tensors": "pt", "padding": True}
    if any(images):
        arguments["images"] = images
    with _padded_on_the_left(processor):
        try:
            tensors = processor(**arguments)
        except (ValueError, IndexError, StopIteration) as error:
            raise UsageError(
                f"the processor refuses the prompt and its images: {error}",
                "Put one image token into the prompt for each image.",
            ) from error
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


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
    prompts = list(request.prompts)
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", "Say what to do with the image.")
    if len(request.images) == len(prompts) and all(
        isinstance(row, list | tuple) for row in request.images
    ):
        rows = [list(row) for row in request.images]
    else:
        rows = _deal(prompts, list(request.images), token)
    return list(zip(prompts, rows, strict=True))


def _written(
    processor: Any, request: Request, prompt: str, count: int, token: str, *, first: bool
) -> str:
    """The text for the processor: the prompt itself, or the prompt in the chat template."""
    places = prompt.count(token)
    chat = request.options.get("chat")
    if chat is None:
        chat = bool(count) and not places and bool(getattr(processor, "chat_template", None))
    if chat:
        content = [{"type": "image"} for _ in range(count)] + [{"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        render = partial(processor.apply_chat_template, message, add_generation_prompt=True)
        if first:
            try_template(render)
        text: str = render()
        return text
    if places != count:
        raise count_error(prompt, token, count, f"Write {token} once for each image.")
    return prompt


def count_error(prompt: str, token: str, images: int, hint: str) -> UsageError:
    """The error for a prompt whose image tokens and images do not match.

    Args:
        prompt: The prompt.
        token: The image token in its text.
        images: The number of images.
        hint: What to do if there are images.
    """
    places = counted(prompt.count(token), "image token")
    if images == 0:
        return UsageError(
            f"the prompt {prompt!r} has {places} ({token}), and no image is given", NO_IMAGE
        )
    return UsageError(
        f"the prompt {prompt!r} has {places} ({token}) and {counted(images, 'image')}", hint
    )


def _deal(prompts: list[str], images: list[Any], token: str) -> list[list[Any]]:
    """Each prompt's images: one for each image token, or one if no prompt has image tokens."""
    if len(prompts) == 1:
        return [images]
    counts = [prompt.count(token) for prompt in prompts]
    if not any(counts) and len(images) == len(prompts):
        counts = [1] * len(prompts)
    if sum(counts) != len(images):
        places = counted(sum(counts), "image token")
        raise UsageError(
            f"{len(prompts)} prompts have {places} ({token}), and there "
            f"{'is' if len(images) == 1 else 'are'} {counted(len(images), 'image')}",
            "Give a list of images for each prompt.",
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
