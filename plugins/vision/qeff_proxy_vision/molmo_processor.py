"""Molmo's processor, of which a subclass corrects two faults.

It fails on a prompt without an image, and puts the features of every image at the first image's
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qeff_proxy_vision.own_processor import without_image_libraries

__all__ = ["corrected"]


def corrected(cls: type[Any]) -> type[Any]:
    """A subclass whose ``process`` takes any number of images, including none."""

    class Adapted(cls):  # type: ignore[misc]
        def process(self, text: str, images: Sequence[Any] | None = None, **options: Any) -> Any:
            tokens = self.get_tokens_input(
                text,
                options.get("message_format", "role"),
                options.get("always_start_with_space", True),
            )
            if not images:
                start = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id
                return {"input_ids": torch.tensor([start, *tokens])}
            process_one = super().process
            with without_image_libraries():
                rows = [process_one(text, [image], **options) for image in images]
            return _joined(rows, len(tokens))

    Adapted.__name__ = Adapted.__qualname__ = cls.__name__
    return Adapted


def _joined(rows: Sequence[Mapping[str, torch.Tensor]], text: int) -> dict[str, torch.Tensor]:
    """Join prompts with one image each, whose last ``text`` ids are equal, to one with all images.

    Each prompt begins with one token, followed by the tokens of its image.
    """
    ids = [rows[0]["input_ids"][:1]]
    places = []
    before = 0
    for row in rows:
        image_ids = row["input_ids"][1 : row["input_ids"].numel() - text]
        index = row["image_input_idx"]
        places.append(torch.where(index >= 0, index + before, index))
        ids.append(image_ids)
        before += image_ids.numel()
    ids.append(rows[0]["input_ids"][rows[0]["input_ids"].numel() - text :])
    joined = {
        name: torch.cat([row[name] for row in rows])
        for name in ("images", "image_masks")
        if name in rows[0]
    }
    return {"input_ids": torch.cat(ids), "image_input_idx": torch.cat(places), **joined}
