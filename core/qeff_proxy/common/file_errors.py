"""What the system says about files, as errors of one line with a hint."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qeff_proxy.errors import ArtifactError, BackendError

_SYSTEM_ERROR = re.compile(r"os error (\d+)|No space left on device")


#: The disk takes no more, whoever writes: other errors may be about another file.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@contextmanager
def writing(path: Path, numbers: Collection[int] | None = None) -> Iterator[None]:
    """Turn the system's refusals to write (disk full, no permission) into one line with a hint.

    Args:
        path: What is written.
        numbers: Of the errors that count as refusals; by default all.

    Raises:
        ArtifactError: The system refused.
    """
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        raise _refusal(path, error) from error
    except Exception as error:
        # safetensors and ONNX Runtime wrap the system's error in one of their own.
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1]) if number[1] else errno.ENOSPC
        if numbers is not None and code not in numbers:
            raise
        raise _refusal(path, OSError(code, os.strerror(code))) from error


@contextmanager
def opening(folder: Path | None) -> Iterator[None]:
    """Say what to do if files that an earlier run compiled cannot be opened.

    Args:
        folder: Where they lie; ``None`` if they were compiled just now.
    """
    try:
        yield
    except BackendError as error:
        if folder is None:
            raise
        again = f"If {folder} was damaged, compile again (qeff-proxy compile --force)."
        hint = f"{error.hint.rstrip('.')}. {again}" if error.hint else again
        raise BackendError(error.problem, hint) from error


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Name the file of an export that was removed while the program ran.

    Raises:
        ArtifactError: A file is missing.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{error.filename or folder} was removed while it was used", "Export the model again."
        ) from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before work begins that needs it.

    Raises:
        ArtifactError: So it is; says why.
    """
    folder = folder.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    number = 0
    if not place.is_dir():
        number = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise _refusal(folder, OSError(number, os.strerror(number)))


def try_writing(folder: Path) -> None:
    """Write a mebibyte to a folder and remove it, after a library failed without a reason.

    Raises:
        OSError: The system refuses; says why.
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
