"""The place of an export: what may be replaced there, and what is there already.

As the place of a dump is (`qeff_proxy.dump.place`): only what the older export wrote is replaced,
and anything else is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.export_folder import (
    KEPT,
    MANIFEST,
    Export,
    enclosing_export,
    find_export,
    read_export,
)
from qeff_proxy.errors import ArtifactError

__all__ = ["check_not_another", "check_place", "existing_export"]

#: What `qeff_proxy.backends.compile_export` makes in ``compiled/``: its folders, their locks, what
#: a kill leaves.
_COMPILED = re.compile(r"\.?[a-z0-9_-]+-[0-9a-f]{12}(\.(lock|old|partial-[0-9a-f]{12}))?\Z")
_ELSEWHERE = "Move it elsewhere, or name another folder."


def existing_export(target: Path, key: dict[str, Any]) -> Export | None:
    """The export in ``target``, if it is whole and what was asked for."""
    try:
        found = find_export(target)
    except ArtifactError:
        return None  # damaged: export again
    return found if found is not None and found.made_by == key else None


def check_not_another(target: Path, key: dict[str, Any]) -> None:
    """Refuse to replace an export of something else.

    Raises:
        ArtifactError: One is there.
    """
    try:
        found = read_export(target)
    except ArtifactError:
        return  # none, or a damaged one
    what = ("identity", "kind", "dtype", "opset", "taps", "weights")
    if any(found.made_by.get(name) != key[name] for name in what):
        raise ArtifactError(
            f"{target} holds another export ({found.model['source']}, {found.kind}, {found.dtype})",
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
    foreign = next(_foreign_files(target), None)
    if foreign is not None:
        raise ArtifactError(
            f"{target} also holds {foreign}, which is no part of the export", _ELSEWHERE
        )


def _foreign_files(target: Path) -> Iterator[str]:
    """What lies in an export's folder and was not written with it."""
    written, processor = _listed_files(target / MANIFEST)
    for path in sorted(target.iterdir()):
        if path.name in {MANIFEST, *KEPT} or path.name in written:
            continue
        if path.name == "processor" and path.is_dir():
            yield from (
                f"processor/{one.name}"
                for one in sorted(path.iterdir())
                if one.name not in processor
            )
        elif path.name == "compiled" and path.is_dir():
            yield from (
                f"compiled/{one.name}"
                for one in sorted(path.iterdir())
                if not _COMPILED.match(one.name)
            )
        else:
            yield path.name


def _listed_files(manifest: Path) -> tuple[set[str], set[str]]:
    """Graphs and weights, and files of the processor, that a manifest lists.

    Read for the names alone: a manifest with damage elsewhere still says what may be replaced.

    Raises:
        ArtifactError: It does not even say that.
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
