"""Granite 4 Vision: features are added before several layers, and not to the embeddings.

The features of each such layer are an input of the body, zero at positions without an image, which
is added to the hidden states before the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, TensorSpec
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, grid_sample
from qeff_proxy_vision.tiles import TileGrid
from qeff_proxy_vision.towers import pixel_part, with_newline

__all__ = ["LayeredBody", "LayeredTower", "build_proxy", "decode", "preprocess"]


class LayeredTower(nn.Module):
    """A tower with a projector for each of several layers.

    Args:
        model: The model with the tower, the projectors and the newline.
        sources: Layer of the tower → its projector, one for each of ``targets``.
        targets: Layers of the language model.
        skip_first: Leave out the first row of each tile, the class token.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: list[tuple[int, nn.Module]],
        targets: list[int],
        *,
        skip_first: bool,
    ) -> None:
        super().__init__()
        self.tower: Any = model.vision_tower
        self.newline: Any = model.image_newline
        self.layers = [layer for layer, _ in sources]
        self.projectors = nn.ModuleList([projector for _, projector in sources])
        self.targets = targets
        self.skip_first = skip_first

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, channels, height, width]`` to ``image_features.<layer> [rows, hidden]``."""
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        features = {}
        for layer, projector, target in zip(
            self.layers, self.projectors, self.targets, strict=True
        ):
            state = states[layer]
            projected = projector(state[:, 1:] if self.skip_first else state)
            features[f"image_features.{target}"] = with_newline(projected, self.newline)
        return features


class LayeredBody(nn.Module):
    """A body with an input of features for some of its layers.

    They are added before a layer runs, outside of it, so that all layers are alike.

    Args:
        body: Its ``decoder`` has ``layers``.
        targets: The layers that get features.
    """

    def __init__(self, body: nn.Module, targets: list[int]) -> None:
        super().__init__()
        self.body = body
        self.targets = targets
        count = len(self._layers())
        if max(targets) >= count:
            # With a cause, so that where only the first layers are loaded, more of them are.
            raise UnsupportedModelError(
                f"features of images go into layer {max(targets)} of the language model, which "
                f"has {counted(count, 'layer')}",
                f"Take {max(targets) + 1} layers or more.",
            ) from IndexError(max(targets))

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """As the body, with ``layer_features.<layer> [batch, query, hidden]`` besides."""
        layers = self._layers()
        with ExitStack() as hooks:
            for number in self.targets:
                add = partial(_add, tensors.pop(f"layer_features__{number}"))
                hooks.callback(layers[number].register_forward_pre_hook(add).remove)
            outputs: dict[str, torch.Tensor] = self.body(**tensors)
        return outputs

    def _layers(self) -> nn.ModuleList:
        decoder: Any = self.body.decoder
        layers: nn.ModuleList = decoder.layers
        return layers


def _add(features: torch.Tensor, _layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's arguments, with the features added to its hidden states."""
    return (arguments[0] + features, *arguments[1:])


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower and projectors; the language model gets features for its layers."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config, inner = model.config, model.model
    vision, text = config.vision_config, config.text_config
    pairs = list(zip(config.deepstack_layer_map, inner.layerwise_projectors, strict=True))
    sources = [(pair[0], projector) for pair, projector in pairs]
    sources += [(config.spatial_vision_layer, each) for each in inner.spatial_projectors]
    targets = [pair[1] for pair, _ in pairs] + list(config.spatial_target_layers)
    first = inner.layerwise_projectors[0]
    side = vision.image_size // vision.patch_size // first.window_side * first.query_side
    grid = TileGrid(config.image_grid_pinpoints, vision.image_size, side)
    module = LayeredTower(
        inner, sources, targets, skip_first=config.vision_feature_select_strategy == "default"
    )
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    rows = {f"image_features.{target}": ("rows", text.hidden_size) for target in targets}
    part = pixel_part(module, model.dtype, tile, rows)

    sample = grid_sample(grid, tile, config.image_token_id, text.vocab_size)
    merges = [Merge("clear", features=None)]
    merges += [
        Merge("replace", f"layer_features.{target}", f"image_features.{target}")
        for target in targets
    ]
    settings = ImageSettings(config.image_token_id, tuple(merges), grid=grid)
    dtype = dtype_name(model.dtype)
    extra = tuple(
        TensorSpec(f"layer_features.{target}", dtype, ("batch", "query", text.hidden_size))
        for target in targets
    )
    text_proxy.parts = tuple(
        replace(each, module=LayeredBody(each.module, targets), inputs=(*each.inputs, *extra))
        if each.name == "body"
        else each
        for each in text_proxy.parts
    )
    return add_vision(text_proxy, part, settings, sample)
