"""QEfficient's ``utils``: what its scripts import from there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from qeff_proxy.utils.tokenizers import load_hf_tokenizer

__all__ = ["load_hf_tokenizer"]


def __getattr__(name: str) -> Any:
    if name.startswith("__") or find_spec(f"{__name__}.{name}") is not None:  # is imported next
        raise AttributeError(name)
    raise ImportError(
        f"there is no {__name__}.{name}: export and compile find what was made before by "
        "themselves, below QEFF_HOME"
    )
