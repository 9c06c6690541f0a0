"""Verify without a reference: a backend must agree with itself, however an input is arranged."""

from __future__ import annotations

from qeff_proxy.verify.self_check.results import SelfVerification
from qeff_proxy.verify.self_check.verify_self import verify_self

__all__ = ["SelfVerification", "verify_self"]
