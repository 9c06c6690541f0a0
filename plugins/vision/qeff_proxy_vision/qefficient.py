"""QEfficient's ``InternProcessor``, for scripts that prepare InternVL's inputs with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qeff_proxy_vision.images import open_image
from qeff_proxy_vision.internvl_chat import CONTEXT
from qeff_proxy_vision.tiles import normalized, split_into_tiles

__all__ = ["InternProcessor"]

_SYSTEM = (
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家"  # noqa: RUF001 (Chinese)
    "合作单位联合开发的多模态大语言模型。<|im_end|>\n"
)
_END = "<|im_end|>\n"


class InternProcessor:
    """Cuts images into tiles and writes prompts.

    Args:
        model: The uncut model, with the checkpoint's own config.
        tokenizer: The checkpoint's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        config = model.config
        self.size = config.force_image_size or config.vision_config.image_size
        side = self.size // config.vision_config.patch_size
        self.num_image_token = int(side**2 * config.downsample_ratio**2)
        self.model, self.tokenizer = model, tokenizer
        model.img_context_token_id = tokenizer.convert_tokens_to_ids(CONTEXT)

    def load_image(
        self, image: Any, input_size: int | None = None, max_num: int = 12
    ) -> torch.Tensor:
        """An image's tiles and, if there are several, an overview: ``[tiles, 3, size, size]``.

        Args:
            image: A path, URL, bytes, PIL image or array.
            input_size: Side of a tile in pixels; by default the checkpoint's.
            max_num: Most tiles.
        """
        size = input_size or self.size
        tiles = split_into_tiles(open_image(image), size, (1, max_num), overview=True)
        return torch.from_numpy(np.stack([normalized(tile) for tile in tiles]))

    def __call__(
        self,
        pixel_values: torch.Tensor | None,
        question: Sequence[str],
        messages: Sequence[Sequence[str | None]],
        roles: Sequence[str],
        *,
        num_patches_list: Sequence[int] | None = None,
    ) -> list[str]:
        """A prompt for each question, with a place for each row of its image's features.

        Args:
            pixel_values: The tiles of all images.
            question: A text for each image; ``<image>`` is its place, by default the beginning.
            messages: What was said before: role and text.
            roles: How the user and the assistant are introduced.
            num_patches_list: The number of tiles of each image.
        """
        counts = num_patches_list
        if counts is None:
            counts = [] if pixel_values is None else [len(pixel_values)]
        prompts = []
        for text, tiles in zip(question, counts, strict=True):
            text = text if "<image>" in text else f"<image>\n{text}"
            said = [*messages, (roles[0], text), (roles[1], None)]
            turns = [f"{role}{words}{_END}" if words else str(role) for role, words in said]
            image = f"<img>{CONTEXT * (self.num_image_token * tiles)}</img>"
            prompts.append((_SYSTEM + "".join(turns)).replace("<image>", image, 1))
        return prompts
