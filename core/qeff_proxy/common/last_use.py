"""When a folder of the cache was last used: the access time of the file that makes it whole.

It is set, since most file systems keep access times to the day, or not at all.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def mark_used(path: Path) -> None:
    """Set the access time of a file to now, where that may be changed."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
