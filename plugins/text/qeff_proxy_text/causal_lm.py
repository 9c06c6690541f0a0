"""Causal language models that transformers' generic calls describe in full.

Prompts become token ids, padded on the left, and new token ids become text. Where the two sites
are and how the model is cut is left to the core's generic plugin, whose cut the core verifies for
these as for any other model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qeff_proxy.families.tokenize import tokenize
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.request import refuse_others

if TYPE_CHECKING:
    import torch
    from qeff_proxy.request import Request

__all__ = ["decode", "preprocess"]


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Token ids and mask of the prompts.

    No chat template or other text is added. ``None`` where the user made the tensors, gave no
    prompts, or there is no tokenizer.
    """
    refuse_others(request, "prompts")
    if request.inputs is not None or not request.prompts or processor is None:
        return None
    return tokenize(processor, request.prompts)


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[str] | None:
    """The texts of ``generated_ids``, special tokens left out; ``None`` without a tokenizer."""
    if processor is None or "generated_ids" not in outputs:
        return None
    texts: list[str] = processor.batch_decode(outputs["generated_ids"], skip_special_tokens=True)
    return texts
