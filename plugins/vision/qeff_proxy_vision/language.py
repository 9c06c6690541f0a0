"""The language model of a model with towers: cut, found in the model, and its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.parts import Kind, Proxy, TensorSpec
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.granite4_vision import LayeredBody
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
    module: nn.Module = LayeredBody(body.module, layers) if layers else body.module
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
