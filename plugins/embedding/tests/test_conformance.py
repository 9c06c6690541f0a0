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
    # On HTP in float16 the few logits of random weights are 34 dB off, 2.7 beyond the limit.
    verified_on = ("onnxruntime", "torch", "openvino")
    auto_class = "AutoModelForSequenceClassification"
    capabilities = ENCODER
