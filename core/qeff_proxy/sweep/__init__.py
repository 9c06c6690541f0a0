"""Sweep: verify many models on many backends, keep every result, and say what changed.

`qeff_proxy.sweep.compare_nights` is imported from its module: it needs all of the comparison of
dumps, which a sweep of which nothing has changed does not.
"""

from __future__ import annotations

from qeff_proxy.sweep.ledger import Ledger
from qeff_proxy.sweep.plan import read_plan
from qeff_proxy.sweep.run_sweep import run_sweep

__all__ = ["Ledger", "read_plan", "run_sweep"]
