"""Read and write weights files in pieces, past the system's cache where they are large.

A file that is read or written goes through the system's cache: memory is found for each page, and
filled. For a file that was not there before, that takes several times as long as to hash it, and
drives out what is of more use. So a large file is read and written directly, to and from a few
mebibytes that are used over and over, unless the cache holds all of it already.

Where the system or the file system has no direct way, everything goes through the cache.
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

#: Bytes that are given at a time: hashed and looked at while the processor has them at hand.
PIECE = 1 << 20
_BLOCK = 4 << 20  # bytes that are read or written at a time
_CACHED = 128 << 10  # bytes that are written at a time through the cache
_ALIGNED = 4096  # what offsets, lengths and memory of direct reads and writes are multiples of
_LARGE = 1 << 30  # bytes of a file that the cache is of no use for
#: The number of the system call ``cachestat`` (Linux 6.5), which the C library has no name for.
_CACHESTAT = 451
#: What direct reads and writes are refused with where they are not to be had.
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def _is_cached(path: Path, size: int) -> bool:
    """Whether the system's cache holds all of a file: as far as it says."""
    if sys.platform != "linux":
        return False
    asked, found = (ctypes.c_uint64 * 2)(0, size), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if ctypes.CDLL(None).syscall(_CACHESTAT, file.fileno(), asked, found, 0) != 0:
            return False
    return found[0] * mmap.PAGESIZE >= size


class _Way:
    """A file, opened to be read or written, and once more to do so directly.

    Args:
        path: The file.
        flags: As for ``os.open``.
        direct: Whether to try.
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
        """Go through the cache from now on, if that is what the error is about."""
        if error.errno not in _UNABLE or self.direct is None:
            raise error
        os.close(self.direct)
        self.direct = None

    def close(self) -> None:
        """Close it."""
        for descriptor in (self.file, self.direct):
            if descriptor is not None:
                os.close(descriptor)
        self.direct = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class FileReader(_Way):
    """Reads parts of a file. While one block is used, the next is read, where that is direct.

    Args:
        path: The file.
        direct: Past the cache; by default where it is large, and not all in the cache.
    """

    def __init__(self, path: Path, *, direct: bool | None = None) -> None:
        self.size = path.stat().st_size
        if direct is None:
            # All or nothing: whoever reads through the cache makes the system read on into it.
            direct = self.size > _LARGE and not _is_cached(path, self.size)
        super().__init__(path, os.O_RDONLY, direct=direct)
        status = os.fstat(self.file)
        self._sparse = status.st_blocks * 512 < status.st_size
        self._buffers = [memoryview(mmap.mmap(-1, _BLOCK)) for _ in range(2)]
        self._ahead = ThreadPoolExecutor(1, "read-ahead")  # its thread begins with its first task

    def close(self) -> None:
        """Close the file; pieces of it may still be used."""
        self._ahead.shutdown()
        super().close()

    def spans(self, begin: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """Where a range holds data and where holes, which are zeros: ``(data, begin, end)``."""
        while begin < end:
            stop, data = end, True
            if self._sparse:
                try:
                    found = min(end, os.lseek(self.file, begin, os.SEEK_DATA))
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    found = end  # nothing but a hole is left
                data = found == begin
                stop = min(end, os.lseek(self.file, begin, os.SEEK_HOLE)) if data else found
            yield data, begin, stop
            begin = stop

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a range, in order.

        Where ``begin`` is a multiple of 8, so are offset and length of all pieces but the last, and
        they lie so in memory. A piece is only good until the next is asked for.

        Raises:
            OSError: The file cannot be read, or became shorter.
        """
        start = begin - begin % _ALIGNED if begin % 8 == 0 else begin
        blocks = [(at, min(_BLOCK, end - at)) for at in range(start, end, _BLOCK)]
        coming = self._read_ahead(0, *blocks[0]) if blocks else None
        for number, (at, count) in enumerate(blocks):
            view = self._buffers[number % 2]
            filled = 0 if coming is None else coming.result()
            last = number + 1 == len(blocks)
            coming = None if last else self._read_ahead(number + 1, *blocks[number + 1])
            try:
                for first in range(0, count, PIECE):
                    stop = min(first + PIECE, count)
                    self._fill(view[max(first, filled) : stop], at + max(first, filled))
                    if stop > begin - at:
                        yield view[max(first, begin - at) : stop]
            finally:
                if coming is not None:
                    coming.exception()  # nobody else may use the buffers while it is filled

    def _fill(self, view: memoryview, at: int) -> None:
        """Read what fills a buffer, through the cache."""
        while view:
            got = os.preadv(self.file, [view], at)
            if got == 0:
                raise OSError(errno.EIO, f"{self.path} became shorter while it was read")
            view, at = view[got:], at + got

    def _read_ahead(self, number: int, at: int, count: int) -> Future[int] | None:
        """Begin to read a block directly; ``None`` where it is to be read through the cache.

        What the cache holds is copied from there by the thread that uses it.
        """
        if self.direct is None or at % _ALIGNED:
            return None
        return self._ahead.submit(self._read_directly, self._buffers[number % 2], at, count)

    def _read_directly(self, view: memoryview, at: int, count: int) -> int:
        """Read into the beginning of a buffer; how much it read, nothing where it cannot."""
        if self.direct is None:
            return 0
        try:
            whole = -(-count // _ALIGNED) * _ALIGNED
            return min(count, os.preadv(self.direct, [view[:whole]], at))
        except OSError as error:
            self.no_longer_direct(error)
            return 0


class FileWriter(_Way):
    """Writes a file of a known size from its beginning to its end.

    Args:
        path: The file; replaced where it is there.
        size: In bytes.
        direct: Past the cache; by default where it is large.
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
        self._at = 0  # where the buffer's first byte belongs; a multiple of its length
        self._begin = self._end = 0  # what of the buffer is still to be written

    def write(self, data: Any) -> None:
        """Write bytes behind the last ones."""
        left = memoryview(data).cast("B")
        while left:
            count = min(len(left), _BLOCK - self._end)
            self._buffer[self._end : self._end + count] = left[:count]
            self._end, left = self._end + count, left[count:]
            if self._end == _BLOCK:
                self._empty()

    def skip(self, count: int) -> None:
        """Leave a hole, which reads as zeros."""
        self._empty()
        self._at, self._end = divmod(self._at + self._end + count, _BLOCK)
        self._at, self._begin = self._at * _BLOCK, self._end

    def finish(self) -> None:
        """Write what is left."""
        self._empty()

    def _empty(self) -> None:
        begin, end = self._begin, self._end
        if self.direct is not None and begin == 0 and end == _BLOCK:
            try:
                begin = os.pwrite(self.direct, self._buffer, self._at)
            except OSError as error:
                self.no_longer_direct(error)
        while begin < end:
            # More at a time makes the system look for memory that it has not used yet.
            stop = min(begin + _CACHED, end)
            begin += os.pwrite(self.file, self._buffer[begin:stop], self._at + begin)
        self._begin = self._end
        if self._end == _BLOCK:
            self._at, self._begin, self._end = self._at + _BLOCK, 0, 0
