"""The version of the installed distribution."""

from __future__ import annotations


def installed_version() -> str:
    """The version of the ``qeff-proxy`` distribution, from its metadata."""
    from importlib_metadata import version

    return version("qeff-proxy")
