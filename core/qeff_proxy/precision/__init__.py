"""Precision: what of a model loses in a lower one, and what has to stay wide."""

from qeff_proxy.precision.sensitivity import Sensitivity, measure_sensitivity

__all__ = ["Sensitivity", "measure_sensitivity"]
