"""The file of a report: where it may be written."""

from __future__ import annotations

import errno
import os
import stat
from os import PathLike
from pathlib import Path

from qeff_proxy.artifact.export_folder import enclosing_export
from qeff_proxy.dump.format import MANIFEST
from qeff_proxy.dump.place import listed_files
from qeff_proxy.errors import DumpError

_ENDINGS = {".html", ".htm"}


def check_report_place(path: str | PathLike[str]) -> None:
    """Refuse a place where a report cannot be written, before the work that it is of.

    Raises:
        DumpError: It would replace a file of a dump or of an export, or the system refuses it.
    """
    check_outside(path)
    place = Path(path).resolve()
    if place.exists() and not (place.is_dir() or stat.S_ISREG(place.stat().st_mode)):
        return  # such as /dev/stdout
    number = 0
    if place.is_dir():
        number = errno.EISDIR
    elif not place.parent.is_dir():
        number = errno.ENOENT
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(place.parent).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise DumpError(
            f"the report {path} cannot be written: {os.strerror(number)}",
            "Make its folder, or name another place.",
        )


def check_outside(path: str | PathLike[str]) -> None:
    """Refuse a file of a dump or of an export as a place for another.

    Raises:
        DumpError: The file lies in one, and its name does not end in ``.html``.
    """
    place = Path(path).resolve()
    if place.suffix.lower() in _ENDINGS:
        return
    owner = enclosing_export(place.parent) or next(
        (folder for folder in place.parents if listed_files(folder / MANIFEST) is not None), None
    )
    if owner is not None:
        raise DumpError(
            f"the report {path} would be written into {owner}, which is a dump or an export",
            "Give it a name that ends in .html, or another place.",
        )
