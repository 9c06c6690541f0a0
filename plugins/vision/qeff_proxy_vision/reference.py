"""The uncut model, run step by step: the reference for a cut.

`model_logits` calls the model as its ``forward`` documents it. `generated_logits` lets ``generate``
of transformers call it, which prepares positions and token types as each model wants them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.flows.causal_engine import position_ids_of
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

__all__ = ["generated_logits", "model_logits"]


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


class _NextTokens(LogitsProcessor):  # type: ignore[misc]
    """Makes generation choose the given tokens: ``[batch, steps]``."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self.tokens = tokens
        self.prompt = prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        step = input_ids.shape[1] - self.prompt
        if step >= self.tokens.shape[1]:
            return scores
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter(1, self.tokens[:, step : step + 1].to(scores.device), 0.0)


def generated_logits(model: PreTrainedModel, tensors: Mapping[str, Array], new: Array) -> Array:
    """Logits of the uncut model as transformers' generation runs it. As `model_logits`."""
    known = inspect.signature(model.forward).parameters
    prompt: dict[str, Any] = {
        name: to_tensor(value).to(model.device) for name, value in tensors.items() if name in known
    }
    for name, value in prompt.items():
        if value.is_floating_point():
            prompt[name] = value.to(model.dtype)
    if "logits_to_keep" in known:
        prompt["logits_to_keep"] = 0  # all of them
    pieces: list[Array] = []

    def keep(_module: Any, _args: Any, outputs: Any) -> None:
        pieces.append(to_array(outputs.logits.float()))

    # Some models keep the positions of their last prompt for the next one.
    kept = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    handle = model.register_forward_hook(keep)
    chosen = _NextTokens(to_tensor(new), prompt["input_ids"].shape[1])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = model.generate(
                **prompt,
                generation_config=GenerationConfig(
                    max_new_tokens=new.shape[1] + 1, do_sample=False, pad_token_id=0
                ),
                logits_processor=LogitsProcessorList([chosen]),
            )
    finally:
        handle.remove()
        for module, deltas in kept:
            module.rope_deltas = deltas
    if new.shape[1] and not (to_array(ids)[:, -new.shape[1] - 1 : -1] == new).all():
        return model_logits(model, tensors, new)  # a generation of its own kind
    return np.concatenate(pieces, axis=1)
