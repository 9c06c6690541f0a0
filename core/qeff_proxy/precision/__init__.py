"""Precision: what of a model loses in a lower one, and what has to stay wide."""

from qeff_proxy.precision.make_recipe import make_recipe
from qeff_proxy.precision.search import Goal
from qeff_proxy.precision.sensitivity import Sensitivity, measure_sensitivity

__all__ = ["Goal", "Sensitivity", "make_recipe", "measure_sensitivity"]
