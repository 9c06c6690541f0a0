"""QEfficient's ``utils.test_utils``: says where its processor is."""

from __future__ import annotations

from typing import Any

from qeff_proxy.auto.qefficient import ELSEWHERE


def __getattr__(name: str) -> Any:
    if name in ELSEWHERE:
        raise ImportError(f"there is no {__name__}.{name}: {ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
