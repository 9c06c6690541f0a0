"""The language model of a model with towers: cut, found in the model, and its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from qeff_proxy.common.messages import counted, first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.parts import Kind, Proxy, TensorSpec
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.proxy import cut_text

__all__ = ["HINT", "cut_language", "decoder_path_of", "special_tokens", "with_inputs"]

HINT = "A plugin for this model type can cut it."


def cut_language(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> Proxy:
    """`qeff_proxy_vision.proxy.cut_text` of any model.

    Raises:
        UnsupportedModelError: The language model cannot be run on its own.
    """
    try:
        return cut_text(model, embedding, lm_head, kind, options)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the language model of {type(model).__name__} cannot be run on its own: "
            f"{type(error).__name__}: {first_line(error)}",
            HINT,
        ) from error


def decoder_path_of(model: PreTrainedModel, text: Proxy) -> str:
    """Where the language model is in the model; the body may have a copy of it."""
    decoder: Any = text.part("body").module.decoder
    alike = [(path, one) for path, one in model.named_modules() if type(one) is type(decoder)]
    path: str = next(path for path, one in alike if one.config is decoder.config)
    return path


def special_tokens(model: PreTrainedModel) -> set[int]:
    """The token ids that the config names: of images, of the beginning and end, of padding."""
    return {
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in vars(config).items()
        if type(value) is int and "token" in name
    }


def with_inputs(text: Proxy, layers: list[int], axes: int) -> Proxy:
    """The cut language model with features for layers, and positions of several axes."""
    body = text.part("body")
    width, dtype = int(text.settings["hidden_size"]), body.inputs[0].dtype
    query = body.inputs[0].shape[1]
    module: nn.Module = _LayeredBody(body.module, layers) if layers else body.module
    inputs = tuple(
        replace(spec, shape=(axes, "batch", query))
        if spec.name == "position_ids" and axes
        else spec
        for spec in body.inputs
    )
    inputs += tuple(
        TensorSpec(f"layer_features.{n}", dtype, ("batch", query, width)) for n in layers
    )
    changed = replace(body, module=module, inputs=inputs)
    return replace(text, parts=tuple(changed if p is body else p for p in text.parts))


class _LayeredBody(nn.Module):
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
