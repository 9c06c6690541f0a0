"""QEfficient's ``cloud.export``: says what there is instead."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"there is no {__name__}.{name}: qeff-proxy export MODEL exports")
