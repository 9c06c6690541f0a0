"""Folders that are complete or absent.

A run writes to a new folder beside the target, and moves it into place at the end. A run that is
killed leaves the target as it was, or the older folder beside its place; the next run that reads or
writes the target moves that back, and removes what the killed run left.

A run locks the folders that it works on (``flock``), and the system releases these locks when the
process ends, however it ends. So a folder beside a target that nobody holds is a leftover.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qeff_proxy.common.file_errors import writing
from qeff_proxy.errors import ArtifactError


@dataclass(frozen=True)
class FolderKind:
    """How the folders beside a target are named, and which of them a later run may touch.

    Attributes:
        partial: Template of the folder that a run writes to, with ``{name}`` (the target's) and
            ``{id}`` (of the run).
        replaced: Template of the older folder, from when it is moved out of the way until it is
            removed.
        is_ours: Whether a leftover holds only what a run wrote, so that it may be removed.
        is_whole: Whether an older folder is complete, so that it may be moved back.
    """

    partial: str
    replaced: str
    is_ours: Callable[[Path], bool] = lambda _folder: True
    is_whole: Callable[[Path], bool] = lambda _folder: True

    def beside(self, target: Path, template: str) -> Path:
        """A new path for ``template``."""
        return target.with_name(template.format(name=target.name, id=uuid.uuid4().hex[:12]))

    def leftovers(self, parent: Path, name: str | None = None) -> list[tuple[Path, Path, bool]]:
        """Each folder beside a target, its target, and whether it is an older one.

        Args:
            parent: Where the targets lie; it may be missing.
            name: Of the only target to look for; by default, all of them.
        """
        try:
            paths = sorted(parent.iterdir())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []  # where names cannot even be listed, no run of this user left any
        matches = (
            (path, re.fullmatch(_pattern(template), path.name), template == self.replaced)
            for path in paths
            for template in (self.partial, self.replaced)
        )
        return [
            (path, parent / match[1], replaced)
            for path, match, replaced in matches
            if match is not None and name in (None, match[1])
        ]


def _pattern(template: str) -> str:
    return template.replace(".", r"\.").format(name="(.+)", id="[a-z0-9_]{8,12}")


_POLL = 0.2  # seconds between two tries to get a lock
#: Folders of exports and compiled parts. One run at a time writes to them (`locked`).
HIDDEN = FolderKind(".{name}.partial-{id}", ".{name}.old")


def _hold(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> int:
    """Lock ``path`` and return the descriptor; closing it releases the lock.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be opened or locked, or another folder now has its name.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise FileNotFoundError(f"{path} is another folder now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder even while it is renamed; yield whether that was possible."""
    try:
        descriptor = _hold(folder)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def locked(
    target: Path, waiting: Callable[[str], None] | None = None, what: str = "export"
) -> Iterator[None]:
    """Hold the lock of a target folder; it is released when the process ends, however it ends.

    Args:
        target: The folder.
        waiting: Called once with what is waited for, where another run holds the lock; without it,
            that is an error.
        what: What the folder is to hold.

    Raises:
        ArtifactError: Another run holds it, or the parent folder cannot be written.
    """
    path = target.with_name(f".{target.name}.lock")
    said = False
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                lock = _hold(path, os.O_RDWR | os.O_CREAT)
                break
            except BlockingIOError as error:
                if waiting is None:
                    raise ArtifactError(
                        f"{target} is in use by another run",
                        "Wait until it has finished, or choose another folder.",
                    ) from error
            if not said:
                waiting(f"waiting for another run to finish this {what}")
                said = True
            time.sleep(_POLL)
    try:
        yield
    finally:
        os.close(lock)


def clear_leftovers(
    kind: FolderKind, parent: Path, name: str | None = None, keep: Sequence[str] = ()
) -> None:
    """Restore or remove what killed runs left in ``parent``; skip what a living process holds.

    A run that was killed between moving the older folder away and the new one in left the older
    one: it is moved back. A run that was killed after that left it too, and the new one takes over
    what it had not yet taken over.

    Args:
        kind: Of folder.
        parent: Where the targets lie; it may be missing.
        name: Of the only target to recover; by default, all of them.
        keep: As in `staged_folder`.

    Raises:
        OSError: The folders cannot be read or removed.
    """
    for path, target, replaced in kind.leftovers(parent, name):
        with held(path) as is_dead:
            if not is_dead or not kind.is_ours(path):
                continue
            if replaced and _is_free(target) and kind.is_whole(path):
                path.rename(target)
                continue
            if replaced:
                _take_over(path, target, keep)
            shutil.rmtree(path)


def recover_folder(target: Path, keep: Sequence[str] = ()) -> None:
    """Clear what killed runs left beside a folder whose lock the caller holds (`clear_leftovers`).

    Raises:
        ArtifactError: It cannot be read or removed.
    """
    with writing(target):
        clear_leftovers(HIDDEN, target.parent, target.name, keep)


def settle_folder(target: Path, keep: Sequence[str] = ()) -> None:
    """Recover ``target`` before it is read, if an interrupted run left something.

    Where nothing was left, this only lists the parent's names. Where another run holds the lock, or
    nothing can be written there, the folder is read as it stands.

    Args:
        target: The folder. The caller does not hold its lock.
        keep: As in `staged_folder`.
    """
    target = target.resolve()
    if HIDDEN.leftovers(target.parent, target.name):
        with suppress(ArtifactError), locked(target):
            recover_folder(target, keep)


@contextmanager
def staged_folder(target: Path, last: str, keep: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``target`` when the context ends without error.

    Args:
        target: The folder to make or replace. The caller holds its lock.
        last: The file that makes the folder complete; it must exist, and is flushed last.
        keep: Subfolders of an older ``target`` that the new one takes over.

    Raises:
        ArtifactError: It cannot be written. The older folder is then as it was.
    """
    with writing(target), replaced_folder(HIDDEN, target, last, keep) as staging:
        yield staging


@contextmanager
def replaced_folder(
    kind: FolderKind, target: Path, last: str | None = None, keep: Sequence[str] = ()
) -> Iterator[Path]:
    """Like `staged_folder`, for a folder of any kind, without its lock.

    Where two runs write to one target at once, the last to finish wins. If ``last`` is ``None``,
    nothing is flushed.

    Raises:
        OSError: It cannot be written. The older folder is then as it was.
    """
    clear_leftovers(kind, target.parent, target.name, keep)
    staging, lock = _make_staging(kind, target)
    try:
        yield staging
        if last is not None:
            if not (staging / last).is_file():
                raise ArtifactError(f"{target} was left without its {last}")
            _flush(staging, last)
        _exchange(kind, staging, target, keep)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_staging(kind: FolderKind, target: Path) -> tuple[Path, int | None]:
    """Make the folder to write in, and hold it; the lock is ``None`` where there are no locks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        staging = kind.beside(target, kind.partial)
        staging.mkdir()
        try:
            return staging, _hold(staging)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run just took it for a leftover
        except OSError:
            return staging, None  # a file system without locks: no run can clear it, either
        except BaseException:
            staging.rmdir()
            raise


def _flush(folder: Path, last: str) -> None:
    """Make sure that everything is on the disk, ``last`` after all other files."""
    inner = (path for path in folder.rglob("*") if path.is_file() or path.is_dir())
    for path in [*(path for path in inner if path != folder / last), folder / last, folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _exchange(kind: FolderKind, staging: Path, target: Path, keep: Sequence[str]) -> None:
    replaced = None if _is_free(target) else kind.beside(target, kind.replaced)
    with held(target):  # so that no other run takes the older folder for a leftover
        try:
            if replaced is not None:
                target.rename(replaced)
            staging.rename(target)
        except BaseException:
            if replaced is not None and replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
        with suppress(PermissionError):  # a parent that may be written but not read
            _sync(target.parent)
        if replaced is not None:
            _take_over(replaced, target, keep)
            shutil.rmtree(replaced, ignore_errors=True)  # the next run removes the rest


def _take_over(old: Path, new: Path, keep: Sequence[str]) -> None:
    """Move the subfolders to keep from the old folder to the new one.

    If both have one, since something was written to the new folder before it took over, entries
    are moved one by one, and renamed where their name is taken.
    """
    for name in keep:
        if not (old / name).exists():
            continue
        if not (new / name).exists():
            (old / name).rename(new / name)
            continue
        for entry in sorted((old / name).iterdir()):
            entry.rename(_free_name(new / name / entry.name))


def _free_name(path: Path) -> Path:
    """``path``, or a similar name beside it where that is taken."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def foreign_entry(
    folder: Path, files: Collection[str], folders: Mapping[str, Callable[[str], object]]
) -> str | None:
    """The first entry of a folder that its manifest does not account for, such as ``io/notes``.

    Args:
        folder: Where to look.
        files: Names of the entries that may be there, whatever they hold.
        folders: Names of the subfolders that may be there, and which names each may hold.
    """
    for path in sorted(folder.iterdir()):
        if path.name in files:
            continue
        if path.name not in folders or not path.is_dir():
            return path.name
        for inner in sorted(path.iterdir()):
            if not folders[path.name](inner.name):
                return f"{path.name}/{inner.name}"
    return None
