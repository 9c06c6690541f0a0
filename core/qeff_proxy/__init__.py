"""qeff-proxy: proxy models of transformers, for people who bring them to accelerators.

A proxy model is a model whose token embedding and LM head are taken out of the graph. This
package cuts them out, verifies the cut, exports the parts to ONNX, runs them on any backend and
writes every tensor to disk.

Importing it is cheap: torch and transformers are imported when a name that needs them is first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_proxy.auto import (
        ClassificationResult,
        GenerationResult,
        QEFFAutoModel,
        QEFFAutoModelForCausalLM,
        QEFFAutoModelForCTC,
        QEFFAutoModelForImageTextToText,
        QEFFAutoModelForMaskedLM,
        QEFFAutoModelForSeq2SeqLM,
        QEFFAutoModelForSequenceClassification,
        QEFFAutoModelForSpeechSeq2Seq,
        QEFFAutoModelForTokenClassification,
        QEffAutoPeftModelForCausalLM,
        cloud_ai_100_exec_kv,
    )
    from qeff_proxy.hookspecs import hookimpl
    from qeff_proxy.parts import MaskSpec, Part, Proxy, TensorSpec
    from qeff_proxy.plugins.manager import Plugins
    from qeff_proxy.request import Request
    from qeff_proxy.sites import Absent, Site

__all__ = [
    "Absent",
    "ClassificationResult",
    "GenerationResult",
    "MaskSpec",
    "Part",
    "Plugins",
    "Proxy",
    "QEFFAutoModel",
    "QEFFAutoModelForCTC",
    "QEFFAutoModelForCausalLM",
    "QEFFAutoModelForImageTextToText",
    "QEFFAutoModelForMaskedLM",
    "QEFFAutoModelForSeq2SeqLM",
    "QEFFAutoModelForSequenceClassification",
    "QEFFAutoModelForSpeechSeq2Seq",
    "QEFFAutoModelForTokenClassification",
    "QEffAutoPeftModelForCausalLM",
    "Request",
    "Site",
    "TensorSpec",
    "cloud_ai_100_exec_kv",
    "hookimpl",
]

_HOMES = {
    "auto": (
        "ClassificationResult",
        "GenerationResult",
        "QEFFAutoModel",
        "QEFFAutoModelForCTC",
        "QEFFAutoModelForCausalLM",
        "QEFFAutoModelForImageTextToText",
        "QEFFAutoModelForMaskedLM",
        "QEFFAutoModelForSeq2SeqLM",
        "QEFFAutoModelForSequenceClassification",
        "QEFFAutoModelForSpeechSeq2Seq",
        "QEFFAutoModelForTokenClassification",
        "QEffAutoPeftModelForCausalLM",
        "cloud_ai_100_exec_kv",
    ),
    "hookspecs": ("hookimpl",),
    "parts": ("MaskSpec", "Part", "Proxy", "TensorSpec"),
    "plugins": ("Plugins",),
    "request": ("Request",),
    "sites": ("Absent", "Site"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"qeff_proxy.{module}"), name)
    is_qefficients = name.lower().startswith("qeff") or name.endswith(("Processor", "Session"))
    if is_qefficients or name in {"compile", "transform"}:
        from qeff_proxy.auto.qefficient import elsewhere

        raise elsewhere(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
