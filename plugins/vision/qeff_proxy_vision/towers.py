"""The vision part: pixels to feature rows of the language model's hidden size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Part, TensorSpec
from torch import nn

__all__ = ["FeaturesPart", "TowerPart", "pixel_part"]


class TowerPart(nn.Module):
    """A tower, and a projector on some of its layers.

    Args:
        tower: Takes ``pixel_values`` and returns ``hidden_states``.
        projector: From the tower's width times the number of layers to the language model's width.
        layers: The hidden states that are concatenated.
        skip_first: Drop the first row of each tile, the class token.
        newline: A row that is appended after all others, ``[hidden]``.
    """

    def __init__(
        self,
        tower: nn.Module,
        projector: nn.Module,
        layers: int | Sequence[int],
        *,
        skip_first: bool,
        newline: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        self.skip_first = skip_first
        self.newline = newline

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, channels, height, width]`` to ``image_features``.

        Returns:
            ``[batch, rows, hidden]``; with a newline ``[batch * rows + 1, hidden]``.
        """
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        chosen = torch.cat([states[layer] for layer in self.layers], dim=-1)
        features = self.projector(chosen[:, 1:] if self.skip_first else chosen)
        return {"image_features": with_newline(features, self.newline)}


class FeaturesPart(nn.Module):
    """The model's ``get_image_features``, without the language model.

    Args:
        model: Its ``get_image_features`` returns one tensor as ``pooler_output``.
        language_model: The name of the submodule to remove.
    """

    def __init__(self, model: nn.Module, language_model: str = "language_model") -> None:
        super().__init__()
        self.model = replace_modules(model, {language_model: nn.Identity()})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, channels, height, width]`` to ``image_features [batch, rows, hidden]``."""
        get_features: Any = self.model.get_image_features
        return {"image_features": get_features(pixel_values, return_dict=True).pooler_output}


def with_newline(features: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """``[batch, rows, hidden]`` unchanged, or with a newline all rows and then the newline."""
    if newline is None:
        return features
    return torch.cat([features.reshape(-1, features.shape[-1]), newline[None]])


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
