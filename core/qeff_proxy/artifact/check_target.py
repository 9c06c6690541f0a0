"""The place of an export: what a new export may replace there, and what it may reuse.

A new export replaces what an earlier one wrote and nothing else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.export_folder import KEPT, enclosing_export, find_export, read_export
from qeff_proxy.artifact.manifest_schema import MANIFEST, Export
from qeff_proxy.common.atomic_folder import foreign_entry
from qeff_proxy.errors import ArtifactError

#: What `qeff_proxy.backends.compile_export` makes in ``compiled/``: folders, their locks, and what
#: killed runs leave.
_COMPILED = re.compile(r"\.?[a-z0-9_-]+-[0-9a-f]{12}(\.(lock|old|partial-[0-9a-f]{12}))?")


def existing_export(target: Path, key: dict[str, Any]) -> Export | None:
    """The export in ``target``, if it is complete and was made by the same ``key``."""
    try:
        export = find_export(target)
    except ArtifactError:
        return None  # damaged: export again
    return export if export is not None and export.made_by == key else None


def check_not_another(target: Path, key: dict[str, Any]) -> None:
    """Refuse to replace an export of something else.

    Raises:
        ArtifactError: One is there.
    """
    try:
        other = read_export(target)
    except ArtifactError:
        return  # none, or a damaged one
    names = ("identity", "kind", "dtype", "opset", "taps", "weights")
    if any(other.made_by.get(name) != key[name] for name in names):
        raise ArtifactError(
            f"{target} holds another export ({other.model['source']}, {other.kind}, {other.dtype})",
            "Name another folder, or pass --force (force=True) to replace it.",
        )


def check_place(target: Path) -> None:
    """Refuse to replace a folder that holds anything that the export in it did not write.

    Raises:
        ArtifactError: Names what is in the way.
    """
    outer = enclosing_export(target.parent)
    if outer is not None:
        raise ArtifactError(f"{target} lies in the export {outer}", "Name a folder outside of it.")
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file", "Name a folder.")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} is not empty and holds no export", "Name a new or empty folder."
        )
    written, processor = _listed_files(target / MANIFEST)
    foreign = foreign_entry(
        target,
        {MANIFEST, *KEPT, *written},
        {"processor": processor.__contains__, "compiled": _COMPILED.fullmatch},
    )
    if foreign is not None:
        raise ArtifactError(
            f"{target} also holds {foreign}, which is no part of the export",
            "Move it elsewhere, or name another folder.",
        )


def _listed_files(manifest: Path) -> tuple[set[str], set[str]]:
    """Graphs and weights, and files of the processor, that a manifest lists.

    The rest of the manifest is not checked: if it is damaged, these names still say what may be
    replaced.

    Raises:
        ArtifactError: The names cannot be read.
    """
    try:
        value = json.loads(manifest.read_bytes())
        graphs = {str(part["file"]) for part in value["parts"]}
        return graphs | set(value["files"]), set(value["processor"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{manifest} is damaged, so that nothing says which files beside it may be replaced",
            "Remove its folder, or name another.",
        ) from error
