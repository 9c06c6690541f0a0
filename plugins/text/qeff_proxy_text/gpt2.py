"""GPT2: the token embedding is ``transformer.wte``, tied to ``lm_head``.

The position embedding, ``transformer.wpe``, stays in the body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.sites import Site

from qeff_proxy_text.causal_lm import decode, preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["decode", "locate_embedding", "locate_lm_head", "preprocess"]


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site | None:
    """``transformer.wte``; ``None`` for a model without an LM head."""
    return _site_at(model, "transformer.wte")


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site | None:
    """``lm_head``, without a bias; no operator follows it."""
    return _site_at(model, "lm_head")


def _site_at(model: PreTrainedModel, path: str) -> Site | None:
    return Site(path) if path in dict(model.named_modules()) else None
