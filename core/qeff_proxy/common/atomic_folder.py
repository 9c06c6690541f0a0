"""Folders that are there whole or not at all.

Everything is written to a hidden folder beside the target and moved into place at the end. A
process that dies leaves the target as it was, or set aside beside it; whoever writes or reads the
target next brings that back and clears away what was left.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qeff_proxy.errors import ArtifactError, BackendError

_SYSTEM_ERROR = re.compile(r"os error (\d+)|No space left on device")

__all__ = [
    "locked",
    "opening",
    "recover_folder",
    "settle_folder",
    "staged_folder",
    "try_writing",
    "writing",
]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write (disk full, no permission) into one clear line.

    Raises:
        ArtifactError: The system refused.
    """
    try:
        yield
    except OSError as error:
        raise _refusal(path, error) from error
    except Exception as error:
        # safetensors and ONNX Runtime wrap the system's error in one of their own.
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1]) if number[1] else errno.ENOSPC
        raise _refusal(path, OSError(code, os.strerror(code))) from error


@contextmanager
def opening(folder: Path | None) -> Iterator[None]:
    """Say what to do where files that were compiled before cannot be opened now.

    Args:
        folder: Where they lie; ``None`` where they were compiled just now.
    """
    try:
        yield
    except BackendError as error:
        if folder is None:
            raise
        again = f"If {folder} was damaged, compile again (qeff-proxy compile --force)."
        hint = f"{error.hint.rstrip('.')}. {again}" if error.hint else again
        raise BackendError(error.problem, hint) from error


def try_writing(folder: Path) -> None:
    """Write a mebibyte to a folder and remove it: for libraries that do not say why they cannot.

    Raises:
        OSError: The system refuses that, too; says why.
    """
    probe = folder / f"probe-{uuid.uuid4().hex[:12]}"
    try:
        probe.write_bytes(bytes(1 << 20))
    finally:
        probe.unlink(missing_ok=True)


def _refusal(path: Path, error: OSError) -> ArtifactError:
    hints = {
        errno.ENOSPC: "Free space there, or set QEFF_HOME (or --output) to another disk.",
        errno.EFBIG: "The system's limit on file sizes is too low; see ulimit -f.",
        errno.EDQUOT: "Free space there, or set QEFF_HOME (or --output) to another disk.",
        errno.ENOENT: "Choose a folder that can be written to.",
        errno.EACCES: "Set QEFF_HOME (or --output) to a folder you may write to.",
        errno.EPERM: "Set QEFF_HOME (or --output) to a folder you may write to.",
        errno.EROFS: "Set QEFF_HOME (or --output) to a folder you may write to.",
        errno.ENOTDIR: "A file stands where a folder is needed; choose another place.",
        errno.EEXIST: "A file stands where a folder is needed; choose another place.",
    }
    reason = error.strerror or str(error)
    return ArtifactError(f"cannot write {path}: {reason}", hints.get(error.errno or 0))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a target folder; it is released when the process ends, however it ends.

    Raises:
        ArtifactError: Another run holds it, or the parent folder cannot be written.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.parent / f".{target.name}.lock"
        # FileLock would wait for a file that cannot be made, as if another run held it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ArtifactError(
                f"{target} is in use by another run",
                "Wait until it has finished, or choose another folder.",
            ) from error
    try:
        yield
    finally:
        lock.release()


def recover_folder(target: Path, keep: Sequence[str] = ()) -> None:
    """Clear away what an interrupted run left beside ``target``. Needs the lock.

    If it was interrupted between moving the old folder away and the new one in, the old one is
    moved back; if after that, the new one takes over what it had not yet taken over.

    Args:
        target: The folder.
        keep: As in `staged_folder`.
    """
    set_aside = _set_aside(target)
    with writing(target):
        if set_aside.exists():
            if target.exists():
                _take_over(set_aside, target, keep)
            else:
                set_aside.rename(target)
        for leftover in _partial(target):
            shutil.rmtree(leftover)


def settle_folder(target: Path, keep: Sequence[str] = ()) -> None:
    """Recover ``target`` for who only reads it, if an interrupted run left something.

    Where nothing was left, this is one look at the parent's names. Where another run holds the
    lock, or nothing can be written there, what stands there is read as it is.

    Args:
        target: The folder. The caller does not hold its lock.
        keep: As in `staged_folder`.
    """
    target = target.resolve()
    if not _set_aside(target).exists() and not _partial(target):
        return
    with suppress(ArtifactError), locked(target):
        recover_folder(target, keep)


def _set_aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _partial(target: Path) -> list[Path]:
    prefix = f".{target.name}.partial-"
    try:
        return [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # where names cannot even be listed, no run of this user left any


@contextmanager
def staged_folder(target: Path, last: str, keep: Sequence[str] = ()) -> Iterator[Path]:
    """Give a folder to write in, which becomes ``target`` when the context ends without error.

    Args:
        target: The folder to make or replace. The caller holds its lock.
        last: The file that makes the folder whole; it is checked for, and flushed last.
        keep: Subfolders of an older ``target`` that the new one takes over.

    Raises:
        ArtifactError: It cannot be written. The older folder is then as it was.
    """
    recover_folder(target, keep)
    staging = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:12]}"
    with writing(target):
        staging.mkdir()
    try:
        with writing(target):
            yield staging
            if not (staging / last).is_file():
                raise ArtifactError(f"{target} was left without its {last}")
            _flush(staging, last)
            _exchange(staging, target, keep)
    except BaseException:
        if not target.exists() and _set_aside(target).exists():  # between the two renames
            _set_aside(target).rename(target)
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _flush(folder: Path, last: str) -> None:
    """Make sure that every file is on the disk, ``last`` after all others."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / last]
    for path in [*files, folder / last, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(staging: Path, target: Path, keep: Sequence[str]) -> None:
    set_aside = _set_aside(target)
    if target.exists():
        target.rename(set_aside)
    staging.rename(target)
    if set_aside.exists():
        _take_over(set_aside, target, keep)


def _take_over(old: Path, new: Path, keep: Sequence[str]) -> None:
    """Move what is kept from the old folder to the new one, and remove the old one.

    Both have it where something was written to the new one before it took over; then entries move
    one by one, under a free name where theirs is taken.
    """
    for name in keep:
        if not (old / name).exists():
            continue
        if not (new / name).exists():
            (old / name).rename(new / name)
            continue
        for entry in sorted((old / name).iterdir()):
            entry.rename(_free_name(new / name / entry.name))
    shutil.rmtree(old)


def _free_name(path: Path) -> Path:
    """``path``, or where that is taken, a name beside it that is not."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(one for one in names if not one.exists())
