"""Run the cells of a plan that the ledger does not have yet, and append what they give.

1. Each cell has an identity (`identify_cells`); one that the ledger has with a verdict is done.
2. A sweep claims a cell by a lock before it starts it, and looks again whether it is done, so that
   two sweeps can share a ledger.
3. Of cells that share an export, the first runs alone, and makes it.
4. A record is appended as its cell ends: what is interrupted goes on there.
"""

from __future__ import annotations

import datetime
import re
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qeff_proxy.common.atomic_folder import locked
from qeff_proxy.common.file_errors import check_writable
from qeff_proxy.dump.selection import matches_any
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.sweep.executors import Executor, load_executor
from qeff_proxy.sweep.identify_cells import Identity, identify_cells
from qeff_proxy.sweep.ledger import FINISHED, Ledger, Night, Record
from qeff_proxy.sweep.plan import Cell, Plan
from qeff_proxy.sweep.run_cell import Job, Outcome

_LONGEST = 1000  # characters of an executor's error
_POLL = 1.0  # seconds between two looks at a cell that another sweep runs


@dataclass
class Sweep:
    """What a sweep came to.

    Attributes:
        ledger: The file of its cells.
        night: Its name in the ledger.
        records: By cell, in the order of the plan; ``None`` for one without a result.
        ran: The cells that ran now.
        elsewhere: Those that another sweep was running, which this one did not wait for.
        interrupted: Whether Ctrl-C ended it.
        notes: What was repaired, and results that could not be kept.
    """

    ledger: Path
    night: str
    records: dict[str, Record | None]
    ran: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every cell has a result, and passed."""
        return all(each is not None and each.verdict == "passed" for each in self.records.values())


def run_sweep(
    plan: Plan,
    *,
    on: str | Callable[[int | None], Executor] = "local",
    workers: int | None = None,
    again: Sequence[str] = (),
    only: Sequence[str] = (),
    shard: tuple[int, int] | None = None,
    night: str | None = None,
    wait_for_others: bool = True,
    progress: Callable[[str], None] = lambda _line: None,
    finished: Callable[[Record], None] = lambda _record: None,
) -> Sweep:
    """Run what the ledger lacks.

    Args:
        plan: From `read_plan`.
        on: The executor: ``NAME`` or ``NAME:ADDRESS``, or what makes one, given ``workers``.
        workers: Cells at a time.
        again: Globs of cells to run although the ledger has them.
        only: Globs of the cells to run; those left out are part of the night as they are known.
        shard: ``(i, n)``: only the i-th of n parts of the cells, from 1; a cell stays in its part
            whatever else the plan has.
        night: A name for this run; shards that share one are one night to `compare_nights`.
        wait_for_others: Wait for cells that another sweep on this ledger runs.
        progress: Called with a line about how far it is.
        finished: Called with each record as it is kept.

    Raises:
        UsageError: ``again`` or ``only`` matches no cell, or ``night`` is no name.
        PluginError: There is no such executor.
        ArtifactError: The ledger cannot be written.
    """
    cells = {cell.name: cell for cell in cells_of(plan, shard)}
    for pattern in (*again, *only):
        if not any(fnmatchcase(name, pattern) for name in cells):
            raise UsageError(f"no cell matches {pattern!r}, which is to run")
    if night is not None and re.fullmatch(r"[\w:-][\w.:-]*", night) is None:
        raise UsageError(f"{night!r} cannot name a night", "Use letters, digits and - _ . :")
    run = _Run(plan, cells, again, only or ("*",), night, wait_for_others, progress, finished)
    if run.pending:
        executor = load_executor(on, workers) if isinstance(on, str) else on(workers)
        try:
            run.loop(executor)
        except KeyboardInterrupt:
            run.sweep.interrupted = True
        finally:
            executor.close()
            run.claims.close()
    return run.sweep


def cells_of(plan: Plan, shard: tuple[int, int] | None = None) -> list[Cell]:
    """The cells of a plan, or of a part ``(i, n)`` of it."""
    part, parts = shard or (1, 1)
    return [c for c in plan.cells if zlib.crc32(c.name.encode()) % parts == part - 1]


class _Run:
    """The state of a sweep between its cells."""

    def __init__(
        self,
        plan: Plan,
        cells: dict[str, Cell],
        again: Sequence[str],
        only: Sequence[str],
        night: str | None,
        wait_for_others: bool,
        progress: Callable[[str], None],
        finished: Callable[[Record], None],
    ) -> None:
        self.cells = cells
        self.wait_for_others = wait_for_others
        self.progress, self.finished = progress, finished
        self.ledger = Ledger(plan.ledger)
        check_writable(plan.ledger.parent)
        progress("identifying the cells")
        self.identities: dict[str, Identity] = identify_cells(cells.values())
        ids = {name: identity.id for name, identity in self.identities.items()}
        wanted = set(ids.values())
        done = {r.id: r for r in self.ledger.new_records() if r.id in wanted}
        now = datetime.datetime.now(datetime.UTC)
        night = night or f"{now:%Y-%m-%dT%H-%M-%S}-{uuid.uuid4().hex[:4]}"
        chosen = [name for name in cells if matches_any(name, only)]
        self.sweep = Sweep(plan.ledger, night, {name: done.get(ids[name]) for name in chosen})
        if cells:
            left_out = tuple(name for name in cells if name not in chosen)
            self._note(self.ledger.append_night(Night(night, str(plan.path), ids, left_out)))
        self.pending = [
            name
            for name, record in self.sweep.records.items()
            if record is None or record.verdict not in FINISHED or matches_any(name, again)
        ]
        # Cells that differ in nothing but their names run once.
        self.pending = list({ids[name]: name for name in reversed(self.pending)}.values())[::-1]
        self.claims = ExitStack()
        self._claimed: dict[str, ExitStack] = {}
        self._total = len(self.pending)
        self._elsewhere: set[str] = set()
        self._kept: set[str] = set()
        self._names: dict[str, list[str]] = {}
        for name, identity in ids.items():
            self._names.setdefault(identity, []).append(name)
        self._making: set[str] = set()
        self._made: set[str] = set()

    def loop(self, executor: Executor) -> None:
        """Run the pending cells."""
        running: dict[Future[Outcome], str] = {}
        while self.pending or running:
            for name in self._startable(executor.slots - len(running)):
                future = executor.submit(self._job(name))
                running[future] = name
            self._report(running.values())
            if not running:
                if self.pending and not self._wait_for_others():
                    return
                continue
            done, _ = wait(running, _POLL, FIRST_COMPLETED)
            for future in done:
                self._keep(running.pop(future), future)

    def _startable(self, slots: int) -> list[str]:
        """Claim as many pending cells as there are slots, and take them off."""
        started: list[str] = []
        for name in list(self.pending):
            if len(started) >= slots:
                break
            export = self.identities[name].export
            if export in self._making or not self._claim(name):
                continue
            self.pending.remove(name)
            if self._is_done_elsewhere(name):
                self._release(name)
                continue
            if export not in self._made:
                self._making.add(export)
            started.append(name)
        return started

    def _claim(self, name: str) -> bool:
        claim = ExitStack()
        place = self.ledger.folder / "locks" / self.identities[name].id[:16]
        try:
            claim.enter_context(locked(place, what="cell"))
        except ArtifactError:
            if not place.parent.is_dir():
                raise  # it cannot be made
            return False
        self._claimed[name] = self.claims.enter_context(claim)
        return True

    def _release(self, name: str) -> None:
        self._claimed.pop(name).close()

    def _is_done_elsewhere(self, name: str) -> bool:
        """Whether another sweep has kept a result of the cell since this one began."""
        for record in self.ledger.new_records():
            if record.id not in self._kept:
                self._set(record)
                if record.verdict in FINISHED:
                    self._elsewhere.add(record.id)
        return self.identities[name].id in self._elsewhere

    def _set(self, record: Record) -> None:
        for name in self._names.get(record.id, ()):
            if name in self.sweep.records:
                self.sweep.records[name] = record

    def _wait_for_others(self) -> bool:
        """Wait for cells that other sweeps have claimed; False if that is not wanted."""
        if not self.wait_for_others:
            self.sweep.elsewhere += self.pending
            return False
        time.sleep(_POLL)
        return True

    def _job(self, name: str) -> Job:
        identity = self.identities[name]
        folder = self.ledger.folder.resolve()
        return Job(self.cells[name], identity.id, self.sweep.night, identity.versions, folder)

    def _keep(self, name: str, future: Future[Outcome]) -> None:
        """Append the record of a cell that ended, and let others have the cell."""
        fingerprint: Any = None
        try:
            record, fingerprint = future.result()
        except Exception as error:  # noqa: BLE001 (an executor's own fault must not stop the others)
            said = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
            record = self._job(name).record("killed", said)
        try:
            self._kept.add(record.id)
            self._note(self.ledger.append(record, fingerprint))
        except ArtifactError as error:  # a full disk: the others may still find room
            self.sweep.notes.append(f"the result of {name} is lost: {error}")
        else:
            self._set(record)
            self.sweep.ran.append(name)
            self.finished(record)
        finally:
            self._release(name)
        export = self.identities[name].export
        self._making.discard(export)
        self._made.add(export)

    def _note(self, note: str | None) -> None:
        if note is not None:
            self.sweep.notes.append(note)

    def _report(self, running: Any) -> None:
        bad = sum(
            1
            for name in self.sweep.ran
            if (record := self.sweep.records[name]) is not None and record.verdict != "passed"
        )
        self.progress(
            f"{self._total - len(self.pending) - len(running)} of {self._total} cells, "
            f"{bad} not passed; running {', '.join(running) or 'none'}"
        )
