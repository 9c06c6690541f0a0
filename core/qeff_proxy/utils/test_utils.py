"""QEfficient's ``utils.test_utils``: says where its processor is."""

from __future__ import annotations

from typing import Any

from qeff_proxy.auto.qefficient import elsewhere


def __getattr__(name: str) -> Any:
    raise elsewhere(__name__, name)
