"""Load a checkpoint: config, weights and processor."""

from __future__ import annotations

from qeff_proxy.load.load_model import LoadedModel, load_config, load_model, wrap_model
from qeff_proxy.load.load_processor import load_processor

__all__ = ["LoadedModel", "load_config", "load_model", "load_processor", "wrap_model"]
