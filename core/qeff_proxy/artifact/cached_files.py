"""What lies below ``QEFF_HOME``: exports, and in them compiled parts, dumps and journals.

What a run uses is not removed: what it holds a lock of, has open or in its memory (on this
machine), or has looked up or written within the last hour.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qeff_proxy.artifact.export_folder import cache_home
from qeff_proxy.artifact.manifest_schema import MANIFEST
from qeff_proxy.common.atomic_folder import HIDDEN, held, locked
from qeff_proxy.common.file_errors import writing
from qeff_proxy.errors import ArtifactError

KINDS = ("export", "compiled", "dump", "journal", "leftover")
_JOURNAL = "by-layer-"
_MARKED = (MANIFEST, "compile.json")  # see `qeff_proxy.common.last_use`
_RECENT = 3600.0  # seconds since the last use, in which a run may need it again


@dataclass(frozen=True)
class Entry:
    """A folder of the cache.

    Attributes:
        kind: One of `KINDS`; a ``leftover`` is of a killed run.
        path: Where it lies.
        size: Bytes on the disk; of an export, without what has an entry of its own.
        last_use: When it was last used or written, in seconds since 1970.
        in_use: Whether a run uses it.
    """

    kind: str
    path: Path
    size: int
    last_use: float
    in_use: bool


def list_cache() -> list[Entry]:
    """The entries of the cache, exports before what is in them."""
    home = cache_home().resolve()
    opened = _open_files()
    entries = [_entry("leftover", path, opened) for path, _, _ in HIDDEN.leftovers(home)]
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        if (folder / MANIFEST).is_file() and re.fullmatch("[^.].*-[0-9a-f]{16}", folder.name):
            inner = [_entry(kind, path, opened) for kind, path in _inner(folder)]
            whole = _entry("export", folder, opened)
            size = whole.size - sum(entry.size for entry in inner)
            entries += [replace(whole, size=size), *inner]
    return entries


def choose(
    entries: Collection[Entry],
    *,
    kinds: Collection[str] = KINDS,
    unused_since: float | None = None,
    most: float | None = None,
    exports: Iterable[str] | None = None,
) -> list[Entry]:
    """Entries to remove, the longest unused first; none that is in use.

    Args:
        entries: All of them.
        kinds: Only entries of these.
        unused_since: Only those that were last used before, in seconds since 1970.
        most: Only as many as must go for all to have so many bytes.
        exports: Only exports of these names, and what is in them.
    """
    names = None if exports is None else set(exports)
    sizes = {entry.path: entry.size for entry in entries}
    total = sum(sizes.values())
    chosen: dict[Path, Entry] = {}
    # What is in an export goes before it: its last use is no later.
    for entry in sorted(entries, key=lambda each: (each.last_use, each.kind == "export")):
        path = entry.path
        is_old = unused_since is None or entry.last_use < unused_since
        is_named = names is None or bool(names & {path.name, path.parents[1].name})
        if entry.in_use or not is_old or not is_named or entry.kind not in kinds:
            continue
        if most is not None and total <= most:
            break
        gone = [each for each in sizes if each == path or path in each.parents]
        total -= sum(sizes.pop(each) for each in gone)
        chosen[path] = entry
    return [entry for path, entry in chosen.items() if not chosen.keys() & set(path.parents)]


def remove(entry: Entry) -> bool:
    """Remove an entry with all that is in it, unless a run uses it by now.

    Raises:
        ArtifactError: It cannot be removed.
    """
    path = entry.path
    with ExitStack() as stack, writing(path):
        if _lock_of(path).exists():
            try:
                stack.enter_context(locked(path))
            except ArtifactError:
                return False
        if _is_used_inside(path, _open_files()):
            return False
        if entry.kind in ("export", "compiled"):  # a later run removes the rest if this is killed
            path = path.rename(HIDDEN.beside(path, HIDDEN.partial))
        (path / "manifest.json").unlink(missing_ok=True)  # what is left is no whole dump
        shutil.rmtree(path)
    return True


def _inner(export: Path) -> Iterator[tuple[str, Path]]:
    """What has an entry of its own in an export."""
    for place, kind in (("compiled", "compiled"), ("io", "dump")):
        folder = export / place
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir():
                yield "journal" if path.name.startswith(_JOURNAL) else kind, path


def _entry(kind: str, folder: Path, opened: Collection[str]) -> Entry:
    size, latest = 0, 0.0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            state = path.lstat()
            if not stat.S_ISDIR(state.st_mode):  # a folder's time is that of the last removal
                size += state.st_size
                used = state.st_atime if path.name in _MARKED else 0.0
                latest = max(latest, state.st_mtime, used)
    latest = latest or folder.stat().st_mtime
    recent = time.time() - latest < _RECENT
    in_use = recent or _is_locked(folder) or _is_used_inside(folder, opened)
    return Entry(kind, folder, size, latest, in_use)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _is_locked(folder: Path) -> bool:
    """Whether a run holds the lock of a folder."""
    if not _lock_of(folder).exists():
        return False
    try:
        with locked(folder):
            return False
    except ArtifactError:
        return True


def _is_used_inside(folder: Path, opened: Collection[str]) -> bool:
    """Whether a run has a file of a folder open, or holds it or one inside of it."""
    if any(each == str(folder) or each.startswith(f"{folder}/") for each in opened):
        return True
    inner = [path for path in folder.glob("*/*") if path.is_dir()]
    return any(_is_locked(path) or _is_held(path) for path in inner) or _is_held(folder)


def _is_held(folder: Path) -> bool:
    with held(folder) as is_free:
        return not is_free


def _open_files() -> set[str]:
    """The files and folders that other processes have open or mapped, as far as this user sees."""
    paths: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with suppress(OSError):
            paths.update(str(link.readlink()) for link in (process / "fd").iterdir())
        with suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            paths.update(line[line.index("/") :] for line in lines if "/" in line)
    return paths
