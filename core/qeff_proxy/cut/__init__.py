"""Cut a model: locate the two ends, build the parts, verify them against the uncut model."""

from __future__ import annotations

from qeff_proxy.cut.cut_model import cut_model

__all__ = ["cut_model"]
