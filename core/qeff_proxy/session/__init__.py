"""A session runs one part: the base class, checks of inputs, and PyTorch as the reference."""

from __future__ import annotations

from qeff_proxy.session.cache_buffers import InPlaceSession
from qeff_proxy.session.session import Session

__all__ = ["InPlaceSession", "Session"]
