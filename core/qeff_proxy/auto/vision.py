"""The face of vision-language models."""

from __future__ import annotations

from qeff_proxy.auto.base import NeedsPlugins

__all__ = ["QEFFAutoModelForImageTextToText"]


class QEFFAutoModelForImageTextToText(NeedsPlugins):
    """A vision-language model."""

    auto_class = "AutoModelForImageTextToText"
    flows = frozenset({"image-text-to-text"})
    extra = "vision"
