"""QEfficient's ``utils``: what its scripts import from there."""

from __future__ import annotations

from typing import Any

from qeff_proxy.utils.tokenizers import load_hf_tokenizer

__all__ = ["load_hf_tokenizer"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"there is no {__name__}.{name}: export and compile find what was made before by "
        "themselves, below QEFF_HOME"
    )
