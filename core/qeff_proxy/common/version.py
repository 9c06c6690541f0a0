"""The version of the installed distribution."""

from __future__ import annotations

__all__ = ["installed_version"]


def installed_version() -> str:
    """The version of the ``qeff-proxy`` distribution, from its metadata."""
    from importlib_metadata import version

    return version("qeff-proxy")
