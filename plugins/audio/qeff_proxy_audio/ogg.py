"""Whether an Ogg file ends where its last stream does.

An Ogg file says nowhere how long it is: a reader takes the last page that it finds for the end, so
half of a file looks whole to it. But the last page of a stream is marked (RFC 3533, section 6).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_cut_off"]

_CAPTURE = b"OggS"
_HEADER = 27
#: A page has at most 255 segments of 255 bytes, behind a header that names their lengths.
_LARGEST_PAGE = _HEADER + 255 + 255 * 255
_END_OF_STREAM = 4


def is_cut_off(path: Path) -> bool:
    """Whether an Ogg file ends within a page, or with one that is not a stream's last.

    Args:
        path: A file. One that is not Ogg is not cut off.
    """
    with path.open("rb") as file:
        if file.read(len(_CAPTURE)) != _CAPTURE:
            return False
        size = file.seek(0, 2)
        file.seek(max(0, size - _LARGEST_PAGE))
        tail = file.read()
    at = tail.rfind(_CAPTURE)
    if at < 0 or len(tail) < at + _HEADER:
        return True
    segments = tail[at + _HEADER - 1]
    lengths = tail[at + _HEADER : at + _HEADER + segments]
    ends = at + _HEADER + segments + sum(lengths)
    return len(lengths) < segments or ends > len(tail) or not tail[at + 5] & _END_OF_STREAM
