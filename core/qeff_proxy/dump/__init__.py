"""Dumps: every tensor of a run on disk, as ``.npy`` files with a manifest.

The format is specified in ``docs/dump-format.md``. Nothing here needs torch or transformers.
"""

from __future__ import annotations

from qeff_proxy.dump.selection import DumpOptions
from qeff_proxy.dump.writer import DumpWriter

__all__ = ["DumpOptions", "DumpWriter"]
