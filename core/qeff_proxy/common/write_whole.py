"""Write a file atomically."""

from __future__ import annotations

import os
import stat
import uuid
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], content: str | bytes) -> None:
    """Write a file beside ``path`` and move it there, so that an older file stays until then.

    A path that is not a regular file, such as ``/dev/stdout``, is written to directly.

    Raises:
        OSError: It cannot be written. An older file is then unchanged.
    """
    place = Path(path).resolve()
    data = content.encode() if isinstance(content, str) else content
    if place.exists() and not stat.S_ISREG(place.stat().st_mode):
        place.write_bytes(data)
        return
    aside = place.with_name(f".{place.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
