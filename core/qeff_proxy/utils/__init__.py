"""QEfficient's ``utils``: what its scripts import from there."""

from __future__ import annotations

from qeff_proxy.utils.tokenizers import load_hf_tokenizer

__all__ = ["load_hf_tokenizer"]
