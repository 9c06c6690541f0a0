"""The face of vision-language models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.auto.causal_lm import (
    GenerationResult,
    as_list,
    check_prompts,
    generate_text,
    inputs_and_settings,
    new_tokens,
)
from qeff_proxy.auto.qefficient import users_frame
from qeff_proxy.common import arguments
from qeff_proxy.common.messages import first_line
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.load_model import LoadedModel, as_in_memory, load_config, with_options
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Arguments of QEfficient's ``prepare_inputs_for_generation``.
_QEFFICIENT = {"inputs", "prefill_seq_len", "batch_size"}


class QEFFAutoModelForImageTextToText(ProxyModel):
    """A vision-language model.

    ``from_pretrained(…, kv_offload=True)``, which is the default, exports vision and language as
    separate graphs; ``kv_offload=False`` asks for one.
    """

    task = TASKS["vision"]

    @property
    def model(self) -> PreTrainedModel:
        """The uncut transformers model, which also has QEfficient's way to prepare inputs."""
        model = super().model
        vars(model).setdefault("prepare_inputs_for_generation", _preparing(model))
        return model

    def take_sizes(self, options: dict[str, Any]) -> None:
        """Take ``height`` and ``width``: the size of the images in pixels.

        Where the vision part is made for one size, what the checkpoint's processor makes of it is
        exported, as with ``from_pretrained(…, image_size=…)``.
        """
        height, width = options.pop("height", None), options.pop("width", None)
        if height is None and width is None:
            return
        if isinstance(height, list | tuple) or isinstance(width, list | tuple):
            raise UsageError(
                f"height {height} and width {width} are several sizes, and graphs are made for one",
                "Give one height and one width.",
            )
        sides = [arguments.whole_number(*each) for each in (("height", height), ("width", width))]
        size = _processed_size(self._loaded, *sides)
        if size is None:
            warnings.warn(
                "height and width are ignored: the graphs take images of any size, as the "
                "checkpoint's processor makes them",
                UserWarning,
                stacklevel=users_frame(),
            )
        elif size != self._loaded.options.get("image_size"):
            loaded = as_in_memory(self._loaded) if self._lent else self._loaded
            self._loaded = with_options(loaded, {"image_size": size})
            self._export = self._compiled = None

    def generate(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        images: Any = None,
        audio: Any = None,
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
            audio: Sounds likewise, of paths or samples, where the model takes them.
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
        if "videos" in settings:
            raise UsageError("no videos are taken", "Give frames of the video: images=[…].")
        texts = check_prompts(prompts, inputs)
        for what, given in (("images", images), ("sounds", audio)):
            if inputs is not None and given is not None:
                raise UsageError(f"{what} go with prompts", "The inputs hold them already.")
        return generate_text(
            self,
            Request(
                prompts=texts,
                audio=as_list(audio),
                images=as_list(images),
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


def _processed_size(loaded: LoadedModel, height: int, width: int) -> str | None:
    """The size of an image for the model, as ``image_size`` has it; ``None`` if it is fixed.

    The processor says how many patches an image has, where that depends on its size.
    """
    if loaded.folder is None:
        return f"{height}x{width}"
    from transformers import AutoImageProcessor

    config = load_config(loaded.folder)
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    try:
        with quiet_loading():
            sizes = AutoImageProcessor.from_pretrained(
                loaded.folder, local_files_only=True, trust_remote_code=loaded.trust_remote_code
            )(images=[np.zeros((height, width, 3), np.uint8)], return_tensors="np")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{loaded.source} has no image processor for images of {height} x {width} pixels "
            f"({first_line(error)})",
            "Add its preprocessor_config.json, or leave height and width out.",
        ) from error
    grid = sizes.get("image_grid_thw", sizes.get("image_grid_hw"))
    if grid is None or not isinstance(patch, int):
        return None
    down, across = (int(patches) * patch for patches in grid[0][-2:])
    return f"{down}x{across}"


def _preparing(model: PreTrainedModel) -> MethodType:
    """Transformers' ``prepare_inputs_for_generation`` of a model, and QEfficient's.

    That one has ``inputs=``, ``prefill_seq_len=`` and ``batch_size=`` and adds positions, which
    ``generate`` makes here: it gives the inputs as they are.
    """
    own: Any = type(model).prepare_inputs_for_generation

    @wraps(own)
    def prepare(self: PreTrainedModel, *args: Any, **named: Any) -> Any:
        if not args and "inputs" in named and set(named) <= _QEFFICIENT:
            return named["inputs"]
        return own(self, *args, **named)

    return MethodType(prepare, model)
