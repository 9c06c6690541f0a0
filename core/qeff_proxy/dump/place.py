"""The place of a dump: what may be replaced there, and how a new dump gets there.

A dump is written beside its place and moved in when it is complete; what stood there is removed
after that, and only if it was an earlier dump and nothing else. What a run that died left there is
cleared by the next (`qeff_proxy.dump.leftovers`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qeff_proxy.dump.format import MANIFEST, PHASES
from qeff_proxy.dump.leftovers import held, listed_files, make_replaced
from qeff_proxy.errors import DumpError

__all__ = ["check_replaceable", "move_into_place", "write_error"]


def check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an earlier dump.

    Raises:
        DumpError: Something else stands there; names it.
    """
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise DumpError(f"{folder} is not a folder", "Choose another place for the dump.")
        foreign = _foreign_file(folder) if folder.exists() else None
    except OSError as error:
        raise write_error(folder, error) from error
    if foreign is not None:
        raise DumpError(
            f"{folder} holds other things than a dump: {foreign}",
            "Choose a new or empty folder, or one that holds a dump to replace.",
        )


def _foreign_file(folder: Path) -> str | None:
    """Something in ``folder`` that is not of a dump; ``None`` where there is nothing or a dump."""
    present = sorted(entry.name for entry in folder.iterdir())
    if not present:
        return None
    if MANIFEST not in present:
        return present[0]
    files = listed_files(folder / MANIFEST)
    if files is None:
        return f"a {MANIFEST} of something else"
    for name in present:
        inner = folder / name
        if name == MANIFEST:
            continue
        if name not in PHASES or inner.is_symlink() or not inner.is_dir():
            return name
        for path in sorted(inner.iterdir()):
            if f"{name}/{path.name}" not in files:
                return f"{name}/{path.name}"
    return None


def move_into_place(work: Path, folder: Path) -> None:
    """Make ``work`` the dump at ``folder``; what stood there is removed, or back on an error.

    Raises:
        DumpError: Something else than a dump stands there now.
        OSError: It cannot be moved.
    """
    for inner in (*work.iterdir(), work):
        if inner.is_dir():
            _sync_folder(inner)
    check_replaceable(folder)
    work.chmod(0o777 & ~_umask())
    if not folder.exists():
        work.rename(folder)
        _sync_folder(folder.parent)
        return
    with held(folder):  # so that no other run takes the older dump for a leftover meanwhile
        replaced = make_replaced(folder)
        try:
            folder.rename(replaced)
            work.rename(folder)
        except BaseException:
            if not folder.exists():
                replaced.rename(folder)
            raise
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(folder: Path, error: OSError) -> DumpError:
    """What to say where the system refuses to write a dump."""
    return DumpError(
        f"the dump {folder} cannot be written: {error.strerror or error}",
        "Free space or choose another folder; keep fewer steps or tensors, or kv='delta'.",
    )
