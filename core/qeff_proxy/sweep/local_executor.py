"""Run cells in processes of this machine, as many as its cores and its memory take."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from qeff_proxy.common.free_memory import free_memory
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep.plan import Cell
from qeff_proxy.sweep.run_cell import Job, Outcome
from qeff_proxy.sweep.watch_cell import PRELOAD, CellWatcher

_USUAL = 2.0  # gigabytes of a cell without a limit, for the number of cells at a time
_NOTHING = 1e-9  # what is left of sums of fractions
_MEMORY = "memory limit"  # among the resources, whose names have no space


class LocalExecutor:
    """A pool of processes, a new one for each cell; each has its own cores.

    A cell waits until its ``cores`` and its ``memory_limit`` are free, and for its ``resources``,
    of which a machine has one each. What it asks for beyond the machine it gets alone.

    Attributes:
        preload: Modules that the process imports from which the others are forked.
        slots: Cells at a time.

    Args:
        workers: Cells at a time; by default one for each core, but 2 GB of free memory for each.
        address: None: there is nothing to connect to.
    """

    preload: Sequence[str] = PRELOAD

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        if address is not None:
            raise UsageError(f"local runs on this machine, not at {address}")
        cores = sorted(os.sched_getaffinity(0))
        memory = (free_memory() or float("inf")) / 10**9
        self.slots = workers or max(1, int(min(len(cores), memory // _USUAL)))
        self._each = max(1, len(cores) // self.slots)
        count = max(len(cores), self.slots)
        self._cores = [cores[place % len(cores)] for place in range(count)]
        self._most = count
        self._memory = memory
        self._used: Counter[str] = Counter()
        self._freed = threading.Condition()
        self._watcher = CellWatcher(self.preload)
        self._threads = ThreadPoolExecutor(self.slots, "sweep")

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a cell when a worker is free."""
        return self._threads.submit(self._run, job)

    def close(self) -> None:
        """Kill the cells that run."""
        self._watcher.close()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> Outcome:
        with self._share_of(job.cell) as cores:
            return self._watcher.run(job, cores, len(cores))

    @contextmanager
    def _share_of(self, cell: Cell) -> Iterator[set[int]]:
        """Cores for a cell, as soon as all that it needs is free."""
        count = min(cell.cores or self._each, self._most)
        needs = Counter({**cell.resources, _MEMORY: cell.memory_limit or 0.0})

        def is_free() -> bool:
            return len(self._cores) >= count and all(
                used < _NOTHING or used + needs[name] <= (self._memory if name == _MEMORY else 1.0)
                for name, used in self._used.items()
                if needs[name]
            )

        with self._freed:
            self._freed.wait_for(is_free)
            cores, self._cores = self._cores[:count], self._cores[count:]
            self._used.update(needs)
        try:
            yield set(cores)
        finally:
            with self._freed:
                self._cores += cores
                self._used.subtract(needs)
                self._freed.notify_all()
