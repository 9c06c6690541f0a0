"""The face of vision-language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.auto.causal_lm import (
    GenerationResult,
    check_prompts,
    generate_text,
    inputs_and_settings,
    new_tokens,
)
from qeff_proxy.common import arguments
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request


class QEFFAutoModelForImageTextToText(ProxyModel):
    """A vision-language model.

    ``from_pretrained(…, kv_offload=True)``, which is the default, exports vision and language as
    separate graphs; ``kv_offload=False`` asks for one.
    """

    task = TASKS["vision"]

    def generate(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        images: Any = None,
        processor: Any = None,
        tokenizer: Any = None,
        chat: bool | None = None,
        generation_len: int | None = None,
        max_new_tokens: int | None = None,
        streamer: Any = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_steps: str = "all",
        io_tensors: str | Sequence[str] = ("*",),
        kv: Literal["delta", "full"] = "delta",
        **settings: Any,
    ) -> GenerationResult:
        """Generate text from images and text.

        Args:
            inputs: The output of the checkpoint's processor: ``input_ids`` and ``attention_mask
                [batch, length]``, ``pixel_values`` …
            prompts: Instead of inputs, a prompt or several; several are padded on the left.
            images: For the prompts: an image, a list of images in the order of their places in the
                prompts, or a list for each prompt. Each is a path, URL, bytes, PIL image or array.
            processor: By default the checkpoint's own.
            tokenizer: Ignored where there are prompts: the processor has one. For inputs, it
                decodes the tokens.
            chat: Apply the chat template to prompts; by default where there is a template and a
                prompt does not mark the places of its images.
            generation_len: New tokens; the same as ``max_new_tokens``.
            max_new_tokens: New tokens; by default the checkpoint's number, else 128, but never
                more than fit.
            streamer: A transformers streamer.
            write_io: Dump inputs and outputs of every part at every step.
            io_dir: Folder of the dump (implies ``write_io``).
            io_steps: Which steps to dump: `qeff_proxy.dump.DumpOptions`.
            io_tensors: Which tensors to dump: a glob, or several.
            kv: ``"delta"`` dumps the cache rows that a step added, ``"full"`` the whole cache.
            settings: Further arguments of transformers' ``generate``.

        Raises:
            UsageError: Images and prompts do not match or do not fit, an image cannot be read, or
                an argument is wrong.
        """
        inputs, settings = inputs_and_settings(self, inputs, settings)
        texts = check_prompts(prompts, inputs)
        if inputs is not None and images is not None:
            raise UsageError("images go with prompts", "The processor's inputs hold them already.")
        return generate_text(
            self,
            Request(
                prompts=texts,
                images=_as_list(images),
                inputs=None if inputs is None else dict(inputs),
                options={} if chat is None else {"chat": chat},
            ),
            self.processor()
            if texts and processor is None
            else arguments.processor("processor", tokenizer if processor is None else processor),
            {
                **settings,
                "max_new_tokens": new_tokens(generation_len, max_new_tokens),
                "streamer": streamer,
            },
            DumpOptions(io_steps, io_tensors, kv),
            io_dir=io_dir,
            write_io=write_io,
        )


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
