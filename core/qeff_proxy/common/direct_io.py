"""Read and write weights files in pieces; large files bypass the page cache.

For a file that the page cache does not hold, allocating and filling pages takes several times as
long as hashing the file, and evicts more useful pages. Large files are therefore read and written
with ``O_DIRECT`` through a few reused mebibytes, unless the cache already holds the whole file.

Where the operating system or file system has no direct IO, all goes through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

#: Bytes per piece: hashed and checked while they are in the processor's cache.
PIECE = 1 << 20
_BLOCK = 4 << 20  # bytes per read or write
_CACHED = 128 << 10  # bytes per write through the page cache
_ALIGNED = 4096  # alignment of offset, length and memory in direct IO
_LARGE = 1 << 30  # larger files bypass the page cache
#: Number of the system call ``cachestat`` (Linux 6.5), which the C library does not wrap.
_CACHESTAT = 451
#: Error codes of file systems without direct IO.
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def _is_cached(path: Path, size: int) -> bool:
    """Whether the page cache holds the whole file; ``False`` where the system cannot tell."""
    if sys.platform != "linux":
        return False
    byte_range, counts = (ctypes.c_uint64 * 2)(0, size), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if ctypes.CDLL(None).syscall(_CACHESTAT, file.fileno(), byte_range, counts, 0) != 0:
            return False
    return counts[0] * mmap.PAGESIZE >= size


class _OpenFile:
    """A file opened twice: through the page cache, and for direct IO where that is possible.

    Args:
        path: The file.
        flags: As for ``os.open``.
        direct: Whether to try direct IO.
    """

    def __init__(self, path: Path, flags: int, *, direct: bool) -> None:
        self.path = path
        self.file = os.open(path, flags, 0o644)
        self.direct: int | None = None
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self.direct = os.open(path, (flags & ~os.O_TRUNC) | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _UNABLE:
                    os.close(self.file)
                    raise

    def no_longer_direct(self, error: OSError) -> None:
        """Fall back to the page cache if ``error`` refuses direct IO; else raise it."""
        if error.errno not in _UNABLE or self.direct is None:
            raise error
        os.close(self.direct)
        self.direct = None

    def close(self) -> None:
        """Close both descriptors."""
        for descriptor in (self.file, self.direct):
            if descriptor is not None:
                os.close(descriptor)
        self.direct = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class FileReader(_OpenFile):
    """Reads ranges of a file; direct IO reads the next block while this one is used.

    Args:
        path: The file.
        direct: Bypass the page cache; by default for large files that it does not hold whole.
    """

    def __init__(self, path: Path, *, direct: bool | None = None) -> None:
        self.size = path.stat().st_size
        if direct is None:
            # All or nothing: reading a part through the cache makes the system read ahead into it.
            direct = self.size > _LARGE and not _is_cached(path, self.size)
        super().__init__(path, os.O_RDONLY, direct=direct)
        status = os.fstat(self.file)
        self._sparse = status.st_blocks * 512 < status.st_size
        self._buffers = [memoryview(mmap.mmap(-1, _BLOCK)) for _ in range(2)]
        self._ahead = ThreadPoolExecutor(1, "read-ahead")  # starts its thread with the first task

    def close(self) -> None:
        """Close the file; pieces already yielded stay valid."""
        self._ahead.shutdown()
        super().close()

    def spans(self, begin: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """Split a range into data and holes (zeros): yields ``(is data, begin, end)``."""
        while begin < end:
            stop, data = end, True
            if self._sparse:
                try:
                    data_at = min(end, os.lseek(self.file, begin, os.SEEK_DATA))
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    data_at = end  # the rest is a hole
                data = data_at == begin
                stop = min(end, os.lseek(self.file, begin, os.SEEK_HOLE)) if data else data_at
            yield data, begin, stop
            begin = stop

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a range, in order.

        If ``begin`` is a multiple of 8, the offset in the file, the address, and the length of all
        pieces but the last are, too. A piece is valid until the next one is requested.

        Raises:
            OSError: The file cannot be read, or became shorter.
        """
        start = begin - begin % _ALIGNED if begin % 8 == 0 else begin
        blocks = [(at, min(_BLOCK, end - at)) for at in range(start, end, _BLOCK)]
        pending = self._read_ahead(0, *blocks[0]) if blocks else None
        for number, (at, count) in enumerate(blocks):
            view = self._buffers[number % 2]
            filled = 0 if pending is None else pending.result()
            last = number + 1 == len(blocks)
            pending = None if last else self._read_ahead(number + 1, *blocks[number + 1])
            try:
                for first in range(0, count, PIECE):
                    stop = min(first + PIECE, count)
                    self._fill(view[max(first, filled) : stop], at + max(first, filled))
                    if stop > begin - at:
                        yield view[max(first, begin - at) : stop]
            finally:
                if pending is not None:
                    pending.exception()  # wait: the buffer must not be used while it is filled

    def _fill(self, view: memoryview, at: int) -> None:
        """Fill a buffer through the page cache."""
        while view:
            got = os.preadv(self.file, [view], at)
            if got == 0:
                raise OSError(errno.EIO, f"{self.path} became shorter while it was read")
            view, at = view[got:], at + got

    def _read_ahead(self, number: int, at: int, count: int) -> Future[int] | None:
        """Start a direct read of a block; ``None`` if it must be read through the page cache."""
        if self.direct is None or at % _ALIGNED:
            return None
        return self._ahead.submit(self._read_directly, self._buffers[number % 2], at, count)

    def _read_directly(self, view: memoryview, at: int, count: int) -> int:
        """Read into the start of a buffer; return the bytes read, 0 without direct IO."""
        if self.direct is None:
            return 0
        try:
            whole = -(-count // _ALIGNED) * _ALIGNED
            return min(count, os.preadv(self.direct, [view[:whole]], at))
        except OSError as error:
            self.no_longer_direct(error)
            return 0


class FileWriter(_OpenFile):
    """Writes a file of known size sequentially.

    Args:
        path: The file; an existing one is replaced.
        size: In bytes.
        direct: Bypass the page cache; by default for large files.
    """

    def __init__(self, path: Path, size: int, *, direct: bool | None = None) -> None:
        super().__init__(
            path,
            os.O_RDWR | os.O_CREAT | os.O_TRUNC,
            direct=size > _LARGE if direct is None else direct,
        )
        try:
            os.ftruncate(self.file, size)
        except OSError:
            self.close()
            raise
        self._buffer = memoryview(mmap.mmap(-1, _BLOCK))
        self._at = 0  # file offset of the buffer's first byte; a multiple of its length
        self._begin = self._end = 0  # the part of the buffer still to be written

    def write(self, data: Any) -> None:
        """Append bytes."""
        left = memoryview(data).cast("B")
        while left:
            count = min(len(left), _BLOCK - self._end)
            self._buffer[self._end : self._end + count] = left[:count]
            self._end, left = self._end + count, left[count:]
            if self._end == _BLOCK:
                self._empty()

    def skip(self, count: int) -> None:
        """Append a hole of ``count`` bytes, which reads as zeros."""
        self._empty()
        self._at, self._end = divmod(self._at + self._end + count, _BLOCK)
        self._at, self._begin = self._at * _BLOCK, self._end

    def finish(self) -> None:
        """Write the rest of the buffer."""
        self._empty()

    def _empty(self) -> None:
        begin, end = self._begin, self._end
        if self.direct is not None and begin == 0 and end == _BLOCK:
            try:
                begin = os.pwrite(self.direct, self._buffer, self._at)
            except OSError as error:
                self.no_longer_direct(error)
        while begin < end:
            # Larger writes make the system allocate pages that are not in its caches yet.
            stop = min(begin + _CACHED, end)
            begin += os.pwrite(self.file, self._buffer[begin:stop], self._at + begin)
        self._begin = self._end
        if self._end == _BLOCK:
            self._at, self._begin, self._end = self._at + _BLOCK, 0, 0
