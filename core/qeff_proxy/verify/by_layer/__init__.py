"""Verify layer by layer: what each layer adds, and what it inherits."""

from __future__ import annotations

from qeff_proxy.verify.by_layer.results import LayerVerification
from qeff_proxy.verify.by_layer.verify_layers import verify_layers

__all__ = ["LayerVerification", "verify_layers"]
