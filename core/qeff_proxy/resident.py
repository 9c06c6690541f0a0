"""Keep few pages of mapped weights in memory.

Pages of a mapped file count as a process's memory once they were read, until the system is short of
memory. What is run of a large model is read a layer at a time, so `few_pages` watches, and gives
pages back as they become many. They stay in the system's cache, and come back when they are read.

Linux only, by ``/proc`` and ``madvise``; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["few_pages"]

_LIMIT = 64 << 20  # bytes
_INTERVAL = 0.005  # seconds, in which some 20 MB are read
_MAPS = Path("/proc/self/smaps")
_STATUS = Path("/proc/self/status")


@contextmanager
def few_pages(windows: Sequence[mmap.mmap], folder: Path | None = None) -> Iterator[None]:
    """Give back pages of mapped files as they become many, and all of them at the end.

    Args:
        windows: Mappings of files that nobody writes to; what was written into one is undone.
        folder: Where another library maps files to read them, and keeps them mapped meanwhile: a
            session of ONNX Runtime, with its weights.
    """
    if sys.platform != "linux" or not _MAPS.exists():
        yield
        return
    folder = folder.resolve() if folder is not None else None
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(over, windows, folder), name="few-pages", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        _give_back(windows, folder)


def _watch(over: threading.Event, windows: Sequence[mmap.mmap], folder: Path | None) -> None:
    before = _file_bytes()
    while not over.wait(_INTERVAL):
        if _file_bytes() > before + _LIMIT:
            _give_back(windows, folder)
            before = _file_bytes()


def _file_bytes() -> int:
    """Bytes of files that are mapped and in memory."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    return 0


def _give_back(windows: Sequence[mmap.mmap], folder: Path | None) -> None:
    for window in windows:
        window.madvise(mmap.MADV_DONTNEED)
    if folder is None:
        return
    library = ctypes.CDLL(None)
    for begin, end in _unchanged(folder):
        # Advice: where it is not taken, the pages stay.
        library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _unchanged(folder: Path) -> list[tuple[int, int]]:
    """Where files of a folder are mapped, and nobody has written into the mapping."""
    found: list[tuple[int, int]] = []
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        key, *rest = line.split(maxsplit=5)
        if not key.endswith(":"):  # "begin-end rights offset device inode path"
            place = key if len(rest) == 5 and Path(rest[4]).parent == folder else ""
        elif place and key == "Anonymous:" and rest[0] == "0":
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
