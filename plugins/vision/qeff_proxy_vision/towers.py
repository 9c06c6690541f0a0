"""The vision part: pixels to rows of the language model's hidden size."""

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
    """A tower whose chosen layers go through a projector.

    Args:
        tower: Takes ``pixel_values`` and gives ``hidden_states``.
        projector: From the tower's width, times the chosen layers, to the language model's.
        layers: Which hidden states are taken, side by side.
        skip_first: Leave out the first row of each tile, the class token.
        newline: A row that is given after all the others, ``[hidden]``.
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
    """The model's own ``get_image_features``, the language model left out.

    Args:
        model: Has ``get_image_features``, whose answer's ``pooler_output`` is one tensor.
        language_model: The name of the submodule to leave out.
    """

    def __init__(self, model: nn.Module, language_model: str = "language_model") -> None:
        super().__init__()
        self.model = replace_modules(model, {language_model: nn.Identity()})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, channels, height, width]`` to ``image_features [batch, rows, hidden]``."""
        get_features: Any = self.model.get_image_features
        return {"image_features": get_features(pixel_values, return_dict=True).pooler_output}


def with_newline(features: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """``[batch, rows, hidden]`` as it is, or as plain rows with the newline as the last."""
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
        module: Takes ``pixel_values`` and gives the features.
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
