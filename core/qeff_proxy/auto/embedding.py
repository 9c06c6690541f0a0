"""The face of encoders and embedding models."""

from __future__ import annotations

from qeff_proxy.auto.base import NeedsPlugins

__all__ = ["QEFFAutoModel"]


class QEFFAutoModel(NeedsPlugins):
    """An encoder or embedding model."""

    auto_class = "AutoModel"
    flows = frozenset({"encoder"})
    extra = "embedding"
