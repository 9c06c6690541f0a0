"""What runs at work hold, and what dead ones left beside the place of a dump.

A run writes to ``<name>.incomplete-…`` and holds that folder's lock (``flock``), which goes with
the process, however it ends. As it puts the dump in its place, the older one is called
``<name>.replaced-…`` for a moment, and held too. So a folder of such a name that nobody holds was
left by a run that is dead.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qeff_proxy.dump.format import FORMAT, MANIFEST, PHASES

__all__ = [
    "clear_leftovers",
    "held",
    "listed_files",
    "make_replaced",
    "make_work_folder",
    "release",
]

_NAME = re.compile(r"(?P<dump>.+)\.(?P<what>incomplete|replaced)-[a-z0-9_]{8}\Z")


def make_work_folder(folder: Path) -> tuple[Path, int | None]:
    """Make the folder in which what will be ``folder`` is written, and hold it.

    Returns:
        The folder, and what `release` takes.

    Raises:
        OSError: It cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.incomplete-", dir=folder.parent))
        try:
            return work, _hold(work)
        except (BlockingIOError, FileNotFoundError):
            continue  # in this very moment another run took it for a leftover
        except OSError:
            return work, None  # a file system without locks: nobody can clear it there, either


def make_replaced(folder: Path) -> Path:
    """Make the name that the older dump at ``folder`` has until the new one stands there.

    Raises:
        OSError: It cannot be made.
    """
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}.replaced-", dir=folder.parent))


def release(descriptor: int | None) -> None:
    """Hold a folder no longer."""
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder, whatever it is called meanwhile; say whether that could be done."""
    try:
        descriptor = _hold(folder)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        release(descriptor)


def _hold(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), folder.lstat()):
            raise FileNotFoundError(f"{folder} is another folder now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Put back or remove what runs that died left in ``parent``.

    An older dump whose place is empty goes back there. Other folders are removed, if nothing is in
    them but what a dump has. Those that a living process holds, or that another user made, are left
    alone.

    Args:
        parent: Where dumps lie; it may be missing.
        name: Of the one dump whose leftovers are meant; by default those of all.

    Raises:
        OSError: They cannot be read or removed.
    """
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = _NAME.match(path.name)
        if match is None or name not in (None, match["dump"]):
            continue
        if path.lstat().st_uid != os.getuid():
            continue  # another user's run will see to it
        with held(path) as is_dead:
            place = parent / match["dump"]
            if not is_dead:
                continue
            if match["what"] == "replaced" and _is_free(place) and _is_whole(path):
                path.rename(place)
            elif _is_of_a_dump(path):
                shutil.rmtree(path)


def _is_free(place: Path) -> bool:
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _is_whole(folder: Path) -> bool:
    files = listed_files(folder / MANIFEST)
    return bool(files) and all((folder / name).is_file() for name in files or ())


def _is_of_a_dump(folder: Path) -> bool:
    """Whether nothing lies there but a manifest and tensors, perhaps not all of them."""
    for path in folder.iterdir():
        if path.is_symlink():
            return False
        if path.is_dir():
            if path.name not in PHASES or any(one.suffix != ".npy" for one in path.iterdir()):
                return False
        elif path.name != MANIFEST:
            return False
    return True


def listed_files(manifest: Path) -> set[str] | None:
    """The files that a manifest lists; ``None`` where it is no dump's."""
    if not manifest.is_file():
        return None
    try:
        value = json.loads(manifest.read_bytes())
        if value["format"] != FORMAT:
            return None
        return {str(entry["file"]) for entry in value["tensors"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
