"""Compare one dump with another: how far apart they are, and where they first diverge.

Nothing here needs torch or transformers.
"""

from __future__ import annotations

from qeff_proxy.compare.compare_dumps import compare_dumps
from qeff_proxy.compare.report import write_report
from qeff_proxy.compare.results import Comparison, Divergence, PairStats, TensorComparison
from qeff_proxy.compare.tolerances import NoiseFloor, Tolerance, Tolerances

__all__ = [
    "Comparison",
    "Divergence",
    "NoiseFloor",
    "PairStats",
    "TensorComparison",
    "Tolerance",
    "Tolerances",
    "compare_dumps",
    "write_report",
]
