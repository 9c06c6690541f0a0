"""Export a proxy to ONNX: trace, repeat layers, write graphs and weights."""

from __future__ import annotations

from qeff_proxy.export.export_model import export_model

__all__ = ["export_model"]
