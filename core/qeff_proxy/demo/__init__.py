"""The demo: checkpoints that come with installed packages, run through the whole flow."""

from __future__ import annotations

from qeff_proxy.demo.demos import Demo

__all__ = ["Demo"]
