"""Conformance suites that plugin authors inherit. They need pytest: ``qeff-proxy[testing]``.

Importing this package is cheap: a suite and its dependencies are imported when its name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_proxy.testing.families import FamilySuite
    from qeff_proxy.testing.family import (
        CAUSAL_LM,
        CTC,
        ENCODER,
        IMAGE_TEXT_TO_TEXT,
        SPEECH_SEQ2SEQ,
        Capabilities,
    )
    from qeff_proxy.testing.tiny import random_ids, random_weights, tiny_config

__all__ = [
    "CAUSAL_LM",
    "CTC",
    "ENCODER",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ2SEQ",
    "Capabilities",
    "FamilySuite",
    "random_ids",
    "random_weights",
    "tiny_config",
]

_HOMES = {
    "families": ("FamilySuite",),
    "family": (
        "CAUSAL_LM",
        "CTC",
        "ENCODER",
        "IMAGE_TEXT_TO_TEXT",
        "SPEECH_SEQ2SEQ",
        "Capabilities",
    ),
    "tiny": ("random_ids", "random_weights", "tiny_config"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"qeff_proxy.testing.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
