"""What ``qeff-proxy backends`` shows of a backend without importing it."""

from __future__ import annotations

from dataclasses import dataclass

import importlib_metadata


@dataclass(frozen=True)
class BackendListing:
    """What a backend is for, what it needs, and whether that is installed.

    A package may register one for each of its backends, as an entry point of the group
    ``qeff_proxy.backend_listings`` with the backend's name. The listing imports its module, which
    therefore imports nothing heavy: no runtime, no compiler, no NumPy.

    Attributes:
        summary: What the backend is for, in a few words.
        requires: The distribution it needs besides its own; ``None`` for none.
        install: How to install what is missing.
    """

    summary: str
    requires: str | None = None
    install: str = ""

    def why_missing(self) -> str:
        """Why the backend cannot be used here; empty if all that it needs is installed.

        By default it needs the distribution ``requires``.
        """
        if self.requires is not None and self.version() is None:
            return f"the package {self.requires} is not installed"
        return ""

    def version(self) -> str | None:
        """The version of ``requires``; ``None`` if it is not installed."""
        if self.requires is None:
            return None
        try:
            return importlib_metadata.version(self.requires)
        except importlib_metadata.PackageNotFoundError:
            return None
