"""The place of a dump: what a new dump may replace there.

A new dump replaces an earlier one and nothing else (`qeff_proxy.common.atomic_folder` says how).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qeff_proxy.common.atomic_folder import FolderKind, foreign_entry
from qeff_proxy.dump.format import FORMAT, MANIFEST, PHASES
from qeff_proxy.errors import DumpError


def listed_files(manifest: Path) -> set[str] | None:
    """The files that a manifest lists; ``None`` where it is not the manifest of a dump."""
    if not manifest.is_file():
        return None
    try:
        value = json.loads(manifest.read_bytes())
        if value["format"] != FORMAT:
            return None
        return {str(entry["file"]) for entry in value["tensors"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_whole(folder: Path) -> bool:
    files = listed_files(folder / MANIFEST) or ()
    return bool(files) and all((folder / name).is_file() for name in files)


def _is_ours(folder: Path) -> bool:
    """Whether this user made the folder, and it holds part of a dump and nothing else."""
    if folder.lstat().st_uid != os.getuid():
        return False
    return _foreign_entry(folder, lambda _phase, name: name.endswith(".npy")) is None


#: The folders beside a dump, which ``docs/dump-format.md`` names (rule ``COMPLETE``).
DUMPS = FolderKind("{name}.incomplete-{id}", "{name}.replaced-{id}", _is_ours, _is_whole)


def check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an earlier dump.

    Raises:
        DumpError: Something else stands there; names it.
    """
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise DumpError(f"{folder} is not a folder", "Choose another place for the dump.")
        foreign = _other_than_a_dump(folder) if folder.exists() else None
    except OSError as error:
        raise write_error(folder, error) from error
    if foreign is not None:
        raise DumpError(
            f"{folder} holds other things than a dump: {foreign}",
            "Choose a new or empty folder, or one that holds a dump to replace.",
        )


def _other_than_a_dump(folder: Path) -> str | None:
    if not (folder / MANIFEST).exists():
        return next((entry.name for entry in sorted(folder.iterdir())), None)
    files = listed_files(folder / MANIFEST)
    if files is None:
        return f"a {MANIFEST} of something else"
    return _foreign_entry(folder, lambda phase, name: f"{phase}/{name}" in files)


def _foreign_entry(folder: Path, accepts: Callable[[str, str], bool]) -> str | None:
    phases = (phase for phase in PHASES if not (folder / phase).is_symlink())
    return foreign_entry(folder, {MANIFEST}, {phase: partial(accepts, phase) for phase in phases})


def write_error(folder: Path, error: OSError) -> DumpError:
    """What to say where the system refuses to write a dump."""
    return DumpError(
        f"the dump {folder} cannot be written: {error.strerror or error}",
        "Free space or choose another folder; keep fewer steps or tensors, or kv='delta'.",
    )
