"""The file of a report: where it may be written."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from qeff_proxy.artifact.export_folder import enclosing_export
from qeff_proxy.dump.format import MANIFEST
from qeff_proxy.dump.place import listed_files
from qeff_proxy.errors import DumpError

_ENDINGS = {".html", ".htm"}


def check_report_place(path: str | PathLike[str]) -> None:
    """Refuse to write a report over a file of a dump or of an export.

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
