"""Position ids of models that number the tokens of images in a way of their own.

Several axes (Qwen's temporal, height and width), a start other than 0 (PaliGemma's 1), and for each
image offsets from the position that the next text token would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from qeff_proxy.arrays import Array

__all__ = ["Positions"]


@dataclass(frozen=True)
class Positions:
    """How a model numbers positions.

    Attributes:
        axes: Of ``position_ids [axes, batch, query]``; 0 for ``[batch, query]``.
        start: The position of the first token.
        image: For each axis the offset of each image token, from where the image begins.
        advance: For each axis the number of positions that an image takes.
    """

    axes: int
    start: int
    image: tuple[tuple[int, ...], ...]
    advance: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The numbering as a JSON object."""
        return {**vars(self), "image": [list(axis) for axis in self.image]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Positions:
        """The numbering that `to_json` wrote."""
        image = tuple(tuple(axis) for axis in value["image"])
        return cls(value["axes"], value["start"], image, tuple(value["advance"]))

    def of_prompt(self, padding: Array, marked: Array) -> tuple[Array, Array]:
        """Positions of a batch of prompts.

        Args:
            padding: ``[batch, length]``, 1 for a token and 0 for padding.
            marked: ``[batch, length]``, the image tokens of images whose features are given.

        Returns:
            Positions ``[axes or 1, batch, length]`` int64, 0 where there is padding, and those of
            the token after the prompt, ``[axes or 1, batch]``.
        """
        image, advance = np.array(self.image, np.int64), np.array(self.advance, np.int64)
        count, (batch, length) = image.shape[1], padding.shape
        positions = np.zeros((len(image), batch, length), np.int64)
        after = np.full((len(image), batch), self.start, np.int64)
        for row in range(batch):
            inside = 0  # tokens of the image so far
            for column in np.flatnonzero(padding[row]):
                here = after[:, row]
                if not marked[row, column]:
                    positions[:, row, column] = here
                    after[:, row] = here + 1
                    continue
                positions[:, row, column] = here + image[:, inside]
                inside = (inside + 1) % count
                if inside == 0:
                    after[:, row] = here + advance
        return positions, after

    def shaped(self, positions: Array) -> Array:
        """``[axes or 1, batch, query]`` as the body takes it."""
        return np.ascontiguousarray(positions if self.axes else positions[0])
