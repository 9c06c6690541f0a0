"""The uncut model, run step by step: the reference for a cut."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.flows.causal_engine import position_ids_of
from transformers import DynamicCache, PreTrainedModel

__all__ = ["model_logits"]


def model_logits(model: PreTrainedModel, tensors: Mapping[str, Array], new: Array) -> Array:
    """Logits of the uncut model with its own cache, masks and merging of images.

    Args:
        model: The model.
        tensors: A processor's output; tensors that the model does not take are ignored.
        new: ``[batch, steps]`` int64: the next tokens, one for each decode step.

    Returns:
        ``[batch, length + steps, vocabulary]`` float32.
    """
    known = inspect.signature(model.forward).parameters
    prompt: dict[str, Any] = {
        name: to_tensor(value) for name, value in tensors.items() if name in known
    }
    for name, value in prompt.items():
        if value.is_floating_point():
            prompt[name] = value.to(model.dtype)
    padding = tensors["attention_mask"]
    pieces: list[Array] = []
    # As transformers' generation creates it; not every model creates one itself.
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    for step in range(new.shape[1] + 1):
        seen = np.concatenate([padding, np.ones_like(new[:, :step])], axis=1)
        arguments = prompt if step == 0 else {"input_ids": to_tensor(new[:, step - 1 : step])}
        arguments = {**arguments, "attention_mask": to_tensor(seen), "use_cache": True}
        arguments[cache_argument(model.forward)] = cache
        if "position_ids" in known:
            length = arguments["input_ids"].shape[1]
            arguments["position_ids"] = to_tensor(position_ids_of(seen, length))
        with torch.no_grad():
            outputs = model(**arguments)
        cache = cache_of(outputs)
        pieces.append(to_array(outputs.logits.float()))
    return np.concatenate(pieces, axis=1)
