"""The Python face: the names and calls that users of QEfficient type.

Thin classes over the one flow. Each differs in the transformers auto class it loads with and in
the task its ``generate`` serves; all else is `qeff_proxy.auto.base.ProxyModel`.
"""

from __future__ import annotations

from qeff_proxy.auto.audio import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.auto.causal_lm import (
    GenerationResult,
    QEFFAutoModelForCausalLM,
    QEFFAutoModelForSeq2SeqLM,
)
from qeff_proxy.auto.classification import (
    ClassificationResult,
    QEFFAutoModelForMaskedLM,
    QEFFAutoModelForSequenceClassification,
    QEFFAutoModelForTokenClassification,
)
from qeff_proxy.auto.embedding import QEFFAutoModel
from qeff_proxy.auto.exec_kv import cloud_ai_100_exec_kv
from qeff_proxy.auto.peft import QEffAutoPeftModelForCausalLM
from qeff_proxy.auto.vision import QEFFAutoModelForImageTextToText

__all__ = [
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
]
