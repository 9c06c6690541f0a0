"""The vision part: pixels to feature rows of the language model's hidden size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Part, TensorSpec
from torch import nn

__all__ = ["FeaturesPart", "pixel_part"]


class FeaturesPart(nn.Module):
    """A method of the model that makes features, without the language model.

    Args:
        model: The model.
        get: Pixels to features, by the model.
        language_model: The name of the submodule to remove.
    """

    def __init__(
        self,
        model: nn.Module,
        get: Callable[[Any, torch.Tensor], torch.Tensor],
        language_model: str = "language_model",
    ) -> None:
        super().__init__()
        self.model = replace_modules(model, {language_model: nn.Identity()})
        self.get = get

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, channels, height, width]`` to ``image_features [batch, rows, hidden]``."""
        return {"image_features": self.get(self.model, pixel_values)}


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
