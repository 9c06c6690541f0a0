"""Detect Ogg files that were cut off.

An Ogg file does not store its length: a reader takes the last page it finds for the end, so half a
file looks complete. But the last page of a stream has a flag (RFC 3533, section 6).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_cut_off"]

_CAPTURE = b"OggS"
_HEADER = 27
#: A page is a header with segment lengths, and at most 255 segments of 255 bytes.
_LARGEST_PAGE = _HEADER + 255 + 255 * 255
_END_OF_STREAM = 4


def is_cut_off(path: Path) -> bool:
    """Whether an Ogg file ends inside a page, or with a page that is not the last of its stream.

    Args:
        path: A file; the result is False for one that is not Ogg.
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
