"""The ledger of sweeps: one JSON line a cell that ran, appended and never changed.

Beside ``NAME.jsonl`` lies ``NAME.nights.jsonl``, with a line for each run of a sweep: which cells
it was to have, by their identity, so that what did not change counts as seen without running again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from qeff_proxy.common.file_errors import writing
from qeff_proxy.errors import UsageError

#: ``failed``: its numbers are wrong. ``refused``: an error that names the reason. ``error``: a
#: defect. ``wrong worker``: it was sent to a machine whose packages or files are not the sweep's.
#: The last four may pass when they run again.
Verdict = Literal[
    "passed", "failed", "refused", "error", "time-out", "out of memory", "killed", "wrong worker"
]
#: Verdicts of cells that do not run again.
FINISHED = frozenset({"passed", "failed", "refused", "error"})


class Divergence(msgspec.Struct, frozen=True):
    """Where a cell first diverged from the reference."""

    part: str
    tensor: str
    layer: int | None
    step: str

    def __str__(self) -> str:
        where = "no layer" if self.layer is None else f"layer {self.layer}"
        return f"{self.part} {where} ({self.tensor}, {self.step})"


class Layer(msgspec.Struct, frozen=True, gc=False):
    """The error of a layer's worst output, over the reference's peak, and its SQNR in dB."""

    at: str
    error: float | None
    sqnr: float | None


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One cell that ran. Reading it leaves the fingerprint out, which is most of a line.

    Attributes:
        id: The cell's identity.
        name: ``MODEL/BACKEND/SETTING/INPUT``.
        night: Of the run of the sweep.
        time: When the cell ended, in UTC.
        verdict: See `Verdict`.
        reason: Why it did not pass, in one line.
        divergence: Where it first diverged.
        error: The largest error of all tensors, over the reference's peak; of a cell by layer, the
            largest that a layer adds.
        worst: The tensor of that error.
        sqnr: Of the model's output, in dB; ``None`` where it is exact or there is none.
        layers: By layer, in the order of the computation.
        equal_tokens: Of ``tokens``.
        seconds: By stage, and ``total``.
        speed: Units a second, where speed was asked for.
        peak_memory: Of the cell's processes, in bytes.
        precision: What the backend computed in.
        options: Of the backend, which name the chip.
        setting: What differs from a setting without keys.
        versions: Of the packages that it depends on.
        export: The name of the export's folder.
        report: Path of its page, relative to the ledger's folder.
    """

    id: str
    name: str
    night: str
    time: str
    verdict: Verdict
    reason: str = ""
    divergence: Divergence | None = None
    error: float | None = None
    worst: str | None = None
    sqnr: float | None = None
    layers: list[Layer] = []
    equal_tokens: int = 0
    tokens: int = 0
    seconds: dict[str, float] = {}
    speed: float | None = None
    peak_memory: int | None = None
    precision: str | None = None
    options: dict[str, Any] = {}
    setting: dict[str, Any] = {}
    versions: dict[str, str] = {}
    export: str | None = None
    report: str | None = None


class Night(msgspec.Struct, frozen=True):
    """One run of a sweep: its cells, name → identity, and which of them it was not to run."""

    night: str
    plan: str
    cells: dict[str, str]
    left_out: tuple[str, ...] = ()


_Line = TypeVar("_Line", Record, Night)


class Ledger:
    """The two files of a ledger, which other runs may append to meanwhile.

    Args:
        path: Of the file of cells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[Path, int] = {}

    @property
    def folder(self) -> Path:
        """Where reports and locks lie."""
        return self.path.with_suffix("")

    @property
    def nights_path(self) -> Path:
        """The file of runs."""
        return self.path.with_suffix(".nights.jsonl")

    def new_records(self) -> Iterator[Record]:
        """The cells that were appended since the last call; all of them in the first."""
        yield from self._new_lines(self.path, Record)

    def new_nights(self) -> Iterator[Night]:
        """The runs, as `new_records`."""
        yield from self._new_lines(self.nights_path, Night)

    def fingerprints(self, ids: Collection[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """The fingerprints of some cells, by identity and night."""
        wanted = [f'{{"id":"{each}"'.encode() for each in ids]
        found = {}
        if wanted and self.path.is_file():
            with self.path.open("rb") as file:
                for line in file:
                    if line.startswith(tuple(wanted)) and line.endswith(b"\n"):
                        value = msgspec.json.decode(line)
                        found[value["id"], value["night"]] = value.get("fingerprint") or {}
        return found

    def append(self, record: Record, fingerprint: Any = None) -> str | None:
        """Append a cell; raises and returns as `append_night`."""
        line = msgspec.to_builtins(record)
        return _append(self.path, {**line, "fingerprint": fingerprint} if fingerprint else line)

    def append_night(self, night: Night) -> str | None:
        """Append a run.

        Returns:
            What was repaired: the last line, where a run was killed while it wrote it.

        Raises:
            ArtifactError: The file cannot be written; its lines are as they were.
        """
        return _append(self.nights_path, msgspec.to_builtins(night))

    def _new_lines(self, path: Path, kind: type[_Line]) -> Iterator[_Line]:
        decoder = msgspec.json.Decoder(kind)
        if not path.is_file():
            return
        with path.open("rb") as file:
            start = file.seek(self._read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn, or still being written
                start += len(line)
                try:
                    value = decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise UsageError(
                        f"{path} holds a line that is none of a ledger, before byte {start}: "
                        f"{error}",
                        "Name a ledger, or remove that line.",
                    ) from error
                self._read[path] = start
                yield value


def _append(path: Path, value: Any) -> str | None:
    """Append a line in one write, under a lock; cut off a torn last line before."""
    line = msgspec.json.encode(value) + b"\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = os.fstat(descriptor).st_size
            whole = _end_of_lines(descriptor, end)
            if whole < end:
                os.ftruncate(descriptor, whole)
            try:
                written = os.write(descriptor, line)
                if written != len(line):  # the disk is full; this raises the reason
                    os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, whole)
                raise
        finally:
            os.close(descriptor)
    return f"{path}: the torn last line was cut off ({end - whole} bytes)" if whole < end else None


def _end_of_lines(descriptor: int, end: int) -> int:
    """Where the last whole line ends."""
    while end > 0:
        start = max(0, end - (1 << 16))
        at = os.pread(descriptor, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
