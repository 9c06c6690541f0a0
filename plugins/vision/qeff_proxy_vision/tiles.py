"""Cut images into tiles, and order the tiles' features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from qeff_proxy.arrays import Array

__all__ = ["TileGrid", "normalized", "sample_tiles", "split_into_tiles"]

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class TileGrid:
    """An overview tile and a grid of tiles, the grid in reading order.

    The processor fits an image into the best of several resolutions, pads it and cuts it into
    tiles. The features of the padding are dropped, and each line ends with the newline row, the
    last row of the vision part's output. The rules are those of transformers' ``LlavaNextModel``.

    Attributes:
        resolutions: The possible sizes, ``[height, width]`` in pixels.
        tile: Side of a tile in pixels.
        side: Side of a tile in feature rows.
    """

    resolutions: tuple[tuple[int, int], ...]
    tile: int
    side: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolutions", tuple(tuple(pair) for pair in self.resolutions))

    def to_json(self) -> dict[str, Any]:
        """The grid as a JSON object."""
        return {
            "resolutions": [list(pair) for pair in self.resolutions],
            "tile": self.tile,
            "side": self.side,
        }

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles, without the overview, for an image of this size in pixels."""
        from transformers.image_processing_utils import select_best_resolution

        best = select_best_resolution((height, width), list(self.resolutions))
        return best[0] // self.tile, best[1] // self.tile

    def tiles(self, pixels: Array, image_sizes: Array) -> Array:
        """The tiles of the images, without those that only pad the array.

        Args:
            pixels: ``[images, most tiles, channels, height, width]``.
            image_sizes: ``[images, 2]``: height and width in pixels.

        Returns:
            ``[tiles, channels, height, width]``.
        """
        pieces = []
        for image, (height, width) in zip(pixels, image_sizes.tolist(), strict=True):
            rows, columns = self.shape(height, width)
            pieces.append(image[: rows * columns + 1])
        return np.concatenate(pieces)

    def order(self, image_sizes: Array) -> Array:
        """The order in which feature rows are read.

        Args:
            image_sizes: ``[images, 2]``: height and width in pixels.

        Returns:
            Indices into the vision part's output rows: those of all tiles, then the newline.
        """
        area = self.side * self.side
        shapes = [self.shape(height, width) for height, width in image_sizes.tolist()]
        newline = sum(rows * columns + 1 for rows, columns in shapes) * area
        start = 0
        pieces = []
        for (height, width), (rows, columns) in zip(image_sizes.tolist(), shapes, strict=True):
            pieces.append(start + np.arange(area))
            grid: Array = start + area + np.arange(rows * columns * area)
            grid = grid.reshape(rows, columns, self.side, self.side).transpose(0, 2, 1, 3)
            lines = _without_padding(
                grid.reshape(rows * self.side, columns * self.side), height, width
            )
            ends = np.full((lines.shape[0], 1), newline)
            pieces.append(np.concatenate([lines, ends], axis=1).reshape(-1))
            start += (rows * columns + 1) * area
        return np.concatenate(pieces)


def _without_padding(lines: Array, height: int, width: int) -> Array:
    """The part of ``lines`` without padding, for an image with proportions ``height : width``."""
    rows, columns = lines.shape
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        padding = (rows - shown) // 2
        return lines[padding : rows - padding]
    shown = int(round(width * (rows / height), 7))
    padding = (columns - shown) // 2
    return lines[:, padding : columns - padding]


def sample_tiles(grid: TileGrid, tile: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """An image of noise, with slightly other proportions than the first resolution.

    Args:
        grid: How it is cut into tiles.
        tile: Channels, height and width of a tile.

    Returns:
        ``pixel_values [1, tiles, channels, height, width]`` float32 and ``image_sizes [1, 2]``.
    """
    import torch

    height, width = grid.resolutions[0]
    height -= grid.tile // 4
    rows, columns = grid.shape(height, width)
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(1, rows * columns + 1, *tile, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def split_into_tiles(
    image: Image.Image, size: int, count: tuple[int, int], *, overview: bool
) -> list[Image.Image]:
    """Cut an image into tiles, in the grid with the closest proportions.

    Among equally close grids, the finer one is used if the image has more than half the pixels for
    it. The rules are those of InternVL's model cards.

    Args:
        image: In RGB.
        size: Side of a tile in pixels.
        count: The smallest and the largest number of tiles.
        overview: Add the whole image as the last tile if there are several.

    Returns:
        Tiles of ``size`` x ``size`` pixels in reading order.
    """
    from PIL import Image

    least, most = count
    grids = {
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    }
    proportions = image.width / image.height
    nearest, best = float("inf"), (1, 1)
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        off = abs(proportions - columns / rows)
        enough = image.width * image.height > 0.5 * size * size * columns * rows
        if off < nearest or (off == nearest and enough):
            nearest, best = off, (columns, rows)
    columns, rows = best
    scaled = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    tiles = [
        scaled.crop((size * x, size * y, size * (x + 1), size * (y + 1)))
        for y in range(rows)
        for x in range(columns)
    ]
    if overview and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def normalized(tile: Any) -> Array:
    """A tile with the mean and deviation of ImageNet's: ``[3, height, width]`` float32."""
    values = np.asarray(tile, np.float32) / 255
    return np.ascontiguousarray(((values - _MEAN) / _STD).transpose(2, 0, 1))
