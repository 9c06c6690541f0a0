"""The conformance suite on an encoder, and on a classifier."""

from __future__ import annotations

from typing import ClassVar

from qeff_proxy.testing import ENCODER, FamilySuite


class TestBert(FamilySuite):
    model_type = "bert"
    auto_class = "AutoModel"
    capabilities = ENCODER
    options: ClassVar = {"pooling": "mean", "normalize": True}
    backends = ("onnxruntime", "torch")


class TestBertClassifier(FamilySuite):
    model_type = "bert"
    task = "classification"
    auto_class = "AutoModelForSequenceClassification"
    capabilities = ENCODER
