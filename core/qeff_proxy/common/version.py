"""The version of the installed distribution."""

from __future__ import annotations

CORE_PACKAGE = "qeff-proxy"


def installed_version() -> str:
    """The version of the ``qeff-proxy`` distribution, from its metadata."""
    from importlib_metadata import version

    return version(CORE_PACKAGE)
