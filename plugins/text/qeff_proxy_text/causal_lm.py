"""Causal language models that the core's generic plugin can locate and cut.

This module only turns prompts into token ids, padded on the left, and new token ids into text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qeff_proxy.families.tokenize import tokenize
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.request import Request, refuse_others

if TYPE_CHECKING:
    import torch

__all__ = ["decode", "preprocess"]


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Token ids and mask of the prompts.

    No chat template or other text is added. ``None`` if the user passed tensors or no prompts, or
    there is no tokenizer.
    """
    refuse_others(request, "prompts")
    if request.inputs is not None or not request.prompts or processor is None:
        return None
    return tokenize(processor, request.prompts)


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[str] | None:
    """The texts of ``generated_ids`` without special tokens; ``None`` without a tokenizer."""
    if processor is None or "generated_ids" not in outputs:
        return None
    texts: list[str] = processor.batch_decode(outputs["generated_ids"], skip_special_tokens=True)
    return texts
