"""Run a cell in a process of its own on this machine, and kill it when it leaves its limits.

The process is forked from one that has imported PyTorch. `run_remote` is what executors of other
machines start there.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import msgspec

from qeff_proxy.sweep.run_cell import Job, Outcome, decode_job, encode_outcome, perform

_POLL = 0.2  # seconds between two looks at the memory of a cell
_GIGABYTE = 10**9
PRELOAD = ("qeff_proxy.sweep.preload",)


class CellWatcher:
    """Starts cells, each in a new process, and watches them.

    Args:
        preload: Modules that the process imports from which the others are forked.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*preload])
        self._closed = threading.Event()

    def close(self) -> None:
        """Kill the cells that run."""
        self._closed.set()

    def run(self, job: Job, cores: Collection[int], threads: int) -> Outcome:
        """Run a cell to its end.

        Args:
            job: The cell.
            cores: That its processes may use.
            threads: Of PyTorch.
        """
        if self._closed.is_set():
            return job.record("killed", "the sweep was interrupted"), None
        ours, theirs = self._context.Pipe(duplex=False)
        log = job.report.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(
            target=_work,
            args=(job, dict(os.environ), cores, threads, log, theirs),
            name=job.cell.name,
        )
        try:
            process.start()
            theirs.close()
            return self._watch(job, process, ours, log)
        finally:
            _kill(process)
            ours.close()
            shutil.rmtree(job.dumps, ignore_errors=True)
            with suppress(FileNotFoundError):
                if log.stat().st_size == 0:
                    log.unlink()

    def _watch(self, job: Job, process: ForkServerProcess, ours: Connection, log: Path) -> Outcome:
        """The outcome of a cell, which is killed when it leaves its limits."""
        limit = job.cell.memory_limit
        start = time.monotonic()
        peak = 0
        while not self._closed.is_set():
            ready = wait([ours, process.sentinel], _POLL)
            peak = max(peak, _memory_of(process.pid))
            more = {"peak_memory": peak, "seconds": {"total": round(time.monotonic() - start, 3)}}
            if ours in ready:
                with suppress(EOFError, OSError):
                    record, fingerprint, size = ours.recv()
                    size = max(peak, size)
                    return msgspec.structs.replace(record, peak_memory=size), fingerprint
            if ready:
                process.join()
                code = process.exitcode or 0
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                said = _last_line(log)
                return job.record("killed", f"its process ended by {how}{said}", **more), None
            if limit is not None and peak > limit * _GIGABYTE:
                reason = f"it was out of its memory limit of {limit:g} GB"
                return job.record("out of memory", reason, **more), None
            if time.monotonic() - start > job.cell.time_limit:
                reason = f"it was not done within its {job.cell.time_limit:g} s{_last_line(log)}"
                return job.record("time-out", reason, **more), None
        return job.record("killed", "the sweep was interrupted"), None


def run_remote(message: bytes, *, again: bool = True) -> bytes:
    """Run a cell on this machine for a sweep on another.

    Its versions and files are compared with those that the sweep knows it by. The folder of reports
    is the sweep's own, shared between the machines.

    Args:
        message: From `qeff_proxy.sweep.run_cell.encode_job`.
        again: Whether this process will run more cells, so that it pays to import PyTorch first.

    Returns:
        For `qeff_proxy.sweep.run_cell.decode_outcome`.
    """
    job = msgspec.structs.replace(decode_job(message), checked=True)
    if not job.folder.is_dir():
        reason = f"{platform.node()} has no folder {job.folder}: the ledger's must be shared"
        return encode_outcome((job.record("wrong worker", reason), None))
    # A cell imports the main module of this process, for Ray's workers most of Ray.
    watcher = _watcher((*PRELOAD, *({"ray"} & sys.modules.keys())) if again else ())
    return encode_outcome(watcher.run(job, os.sched_getaffinity(0), job.cell.cores or 1))


#: One for all cells of a worker's process.
_watcher = cache(CellWatcher)


def _work(
    job: Job,
    environment: dict[str, str],
    cores: Collection[int],
    threads: int,
    log: Path,
    out: Connection,
) -> None:
    """Run a cell in this new process, and send its record, fingerprint and peak memory."""
    os.setsid()  # it and its own processes end together, and Ctrl-C ends only the sweep
    threading.Thread(target=_end_with, args=(out,), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.sched_setaffinity(0, cores)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    record, fingerprint = perform(job)
    out.send((record, fingerprint, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _end_with(out: Connection) -> None:
    """End this process and its own ones when nobody is left to take its result.

    Who watches it may be killed, and then cannot.
    """
    poll = select.poll()
    poll.register(out.fileno(), 0)  # an error, which the closed other end is, is always told
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _kill(process: ForkServerProcess) -> None:
    """End a cell's process with all that it started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        process.kill()  # before it had a group of its own
    process.join()


def _memory_of(session: int | None) -> int:
    """The resident bytes of all processes of a session."""
    pages = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            # The command's name is in parentheses, and may hold any character.
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _last_line(log: Path) -> str:
    """The last line that a cell printed, for the reason of its end."""
    with suppress(OSError):
        lines = log.read_bytes()[-2000:].decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; it said: {said[-300:]}" if said else ""
    return ""
