"""Run a compiled export on a request."""

from __future__ import annotations

from qeff_proxy.run.run_compiled import run_compiled

__all__ = ["run_compiled"]
