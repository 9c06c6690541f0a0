"""Verify: compare backends with PyTorch, tensor by tensor and token by token."""

from __future__ import annotations

from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.results import Verification
from qeff_proxy.verify.verify_model import verify_model

__all__ = ["Verification", "VerifyOptions", "verify_model"]
