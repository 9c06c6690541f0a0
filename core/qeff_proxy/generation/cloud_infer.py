"""QEfficient's ``generation.cloud_infer``: says what there is instead of its session."""

from __future__ import annotations

from typing import Any

from qeff_proxy.auto.qefficient import elsewhere


def __getattr__(name: str) -> Any:
    raise elsewhere(__name__, name)
