"""The vision part: pixels to feature rows of the language model's hidden size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.parts import Part, TensorSpec
from torch import nn

__all__ = ["FeaturesPart", "pixel_part"]


class FeaturesPart(nn.Module):
    """A module that makes features, in a way of its own.

    Args:
        module: The module, without what it needs for texts only.
        get: ``get(module, **pixels)`` makes features.
    """

    def __init__(self, module: nn.Module, get: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self.get = get

    def forward(self, **pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pixels to ``image_features [batch, …, rows, hidden]``."""
        return {"image_features": self.get(self.module, **pixels)}


def pixel_part(
    module: nn.Module,
    dtype: torch.dtype,
    image: tuple[int, int, int],
    features: Mapping[str, tuple[int | str, ...]],
) -> Part:
    """The vision part of a family whose tower takes ``pixel_values`` and nothing else.

    Args:
        module: Takes ``pixel_values`` and returns the features.
        dtype: Of both.
        image: Channels, height and width of a tile.
        features: Name of each output → its axes.
    """
    name = dtype_name(dtype)
    return Part(
        "vision",
        module,
        (TensorSpec("pixel_values", name, ("batch", *image)),),
        tuple(TensorSpec(output, name, axes) for output, axes in features.items()),
        "vision",
    )
