"""Sweep: verify many models on many backends, keep every result, and say what changed."""

from __future__ import annotations

from qeff_proxy.sweep.compare_nights import compare_nights
from qeff_proxy.sweep.ledger import Ledger
from qeff_proxy.sweep.plan import read_plan
from qeff_proxy.sweep.run_sweep import run_sweep

__all__ = ["Ledger", "compare_nights", "read_plan", "run_sweep"]
