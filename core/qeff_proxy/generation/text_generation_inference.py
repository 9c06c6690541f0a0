"""QEfficient's ``generation.text_generation_inference``: ``cloud_ai_100_exec_kv``."""

from __future__ import annotations

from typing import Any

from qeff_proxy.auto.exec_kv import cloud_ai_100_exec_kv

__all__ = ["cloud_ai_100_exec_kv"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"there is no {__name__}.{name}: generate reads prompts and runs them")
