"""Keep few pages of mapped weights in memory.

Pages of a mapped file count as a process's memory once they were read, until the system is short of
memory. What is run of a large model is read a layer at a time, so `few_pages` gives pages back as
they become many: when a module of PyTorch's is done, when it is told to, and at short intervals,
since a single product may read half a gigabyte. They stay in the system's cache, and come back when
they are read.

Linux only, by ``/proc`` and ``madvise``; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook

__all__ = ["few_pages"]

_LIMIT = 32 << 20  # bytes
_INTERVAL = 0.002  # seconds, in which some 20 MB are read
_MAPS = Path("/proc/self/maps")
_DETAILS = Path("/proc/self/smaps")  # says what was written to, and takes long to read
_STATUS = Path("/proc/self/status")


@contextmanager
def few_pages(
    windows: Sequence[mmap.mmap], folder: Path | None = None
) -> Iterator[Callable[[], None]]:
    """Give back pages of mapped files as they become many, and all of them at the end.

    Args:
        windows: Mappings of files that nobody writes to; what was written into one is undone.
        folder: Where another library maps files to read them, and keeps them mapped meanwhile: a
            session of ONNX Runtime, with its weights.

    Yields:
        What gives them back at once.
    """
    if sys.platform != "linux" or not _DETAILS.exists():
        yield lambda: None
        return
    pages = _Pages(windows, folder.resolve() if folder is not None else None)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_INTERVAL):
            pages.limit()

    watcher = threading.Thread(target=watch, name="few-pages", daemon=True)
    hook = register_module_forward_hook(lambda *_: pages.limit())
    watcher.start()
    try:
        yield pages.give_back
    finally:
        hook.remove()
        over.set()
        watcher.join()
        pages.give_back()


class _Pages:
    """What may be given back.

    Args:
        windows: As for `few_pages`, as is ``folder``.
        folder: Resolved.
    """

    def __init__(self, windows: Sequence[mmap.mmap], folder: Path | None) -> None:
        self._windows = windows
        self._folder = folder
        self._clean: list[str] = []  # of the system's list of mappings those that nobody wrote to
        self._most = _file_bytes() + _LIMIT
        self._turn = threading.Lock()

    def limit(self) -> None:
        """Give pages back if there are many."""
        if _file_bytes() > self._most:
            self.give_back()

    def give_back(self) -> None:
        """Give all pages back."""
        with self._turn:
            for window in self._windows:
                window.madvise(mmap.MADV_DONTNEED)
            library = ctypes.CDLL(None)
            for begin, end in self._others():
                # Advice: where it is not taken, the pages stay.
                library.madvise(
                    ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
                )

    def _others(self) -> list[tuple[int, int]]:
        """Where files of the folder are mapped, and nobody had written into the mapping."""
        if self._folder is None:
            return []
        name = f" {self._folder}/"
        text = _MAPS.read_text(encoding="utf-8", errors="surrogateescape")
        found = [line for line in text.splitlines() if name in line]
        if not set(found) <= set(self._clean):
            clean = set(_unwritten())
            self._clean = [line for line in found if line in clean]
        return [_range_of(line) for line in found if line in self._clean]


def _file_bytes() -> int:
    """Bytes of files that are mapped and in memory."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    return 0


def _unwritten() -> Iterator[str]:
    """The lines of the mappings that nobody has written to."""
    head = ""
    for line in _DETAILS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):  # "begin-end rights offset device inode path"
            head = line
        elif line.split() == ["Anonymous:", "0", "kB"]:
            yield head


def _range_of(line: str) -> tuple[int, int]:
    begin, _, end = line.split(maxsplit=1)[0].partition("-")
    return int(begin, 16), int(end, 16)
