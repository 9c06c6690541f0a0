"""Run cells on a Ray cluster: ``--on ray`` or ``--on ray:ADDRESS``, with ``qeff-proxy[ray]``.

A cell is a task that asks for its ``cores`` (else one), its ``memory_limit`` and its ``resources``.
Ray starts a task again whose node is lost. The folder of the ledger and the checkpoints are shared
between the nodes, by the same paths; each node has qeff-proxy and the packages of this machine.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qeff_proxy.errors import PluginError, UsageError
from qeff_proxy.sweep.plan import Cell
from qeff_proxy.sweep.run_cell import Job, Outcome, decode_outcome, encode_job
from qeff_proxy.sweep.watch_cell import run_remote

_RETRIES = 5  # of a cell whose nodes are lost
_MOST = 1000  # cells at a time
_PATIENCE, _POLL = 10.0, 0.1  # seconds that cancelled cells may take to end
#: Variables of this process that cells have, too.
_VARIABLES = ("PYTHONPATH", "QEFF_", "HF_")


class RayExecutor:
    """Cells as tasks of Ray.

    Args:
        workers: Cells at a time; by default as many as the cluster has CPUs, those that wait for
            other resources included.
        address: Of the cluster; by default ``RAY_ADDRESS``, else the one that runs on this machine,
            else one of this machine alone.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise PluginError(
                f"Ray cannot be imported: {error}", "pip install 'qeff-proxy[ray]'"
            ) from error
        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _check_reachable(address)
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"there is no Ray cluster at {address}: {error}", "See ray status."
                ) from error
        variables = {n: v for n, v in os.environ.items() if n.startswith(_VARIABLES)}
        self._environment = {"env_vars": variables}
        self._function = ray.remote(run_remote)
        self._workers = workers
        self._running: dict[Any, None] = {}
        self._threads = ThreadPoolExecutor(_MOST, "sweep")

    @property
    def slots(self) -> int:
        """Cells at a time; the CPUs of the nodes that are there now."""
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        return min(_MOST, self._workers or max(1, cores))

    def submit(self, job: Job) -> Future[Outcome]:
        """Hand a cell to Ray, which starts it when a node has what it needs."""
        needs = _needs_of(job.cell)
        lacking = self._lacking(needs)
        if lacking is not None:
            future: Future[Outcome] = Future()
            future.set_result((job.record("wrong worker", lacking), None))
            return future
        task = self._function.options(
            num_cpus=needs.pop("CPU"),
            num_gpus=needs.pop("GPU", 0),
            memory=int(needs.pop("memory", 0)) or None,
            resources=needs,
            max_retries=_RETRIES,
            runtime_env=self._environment,
            name=job.cell.name,
        ).remote(encode_job(job))
        self._running[task] = None
        return self._threads.submit(self._wait, task)

    def close(self) -> None:
        """Kill the cells that run, and leave the cluster if this has joined it."""
        for force in (False, True):  # a worker that is asked ends what its cell has started
            for task in list(self._running):
                self._ray.cancel(task, force=force)
            end = time.monotonic() + _PATIENCE
            while self._running and time.monotonic() < end:
                time.sleep(_POLL)
        self._threads.shutdown()
        if self._is_ours:
            self._ray.shutdown()

    def _wait(self, task: Any) -> Outcome:
        try:
            return decode_outcome(self._ray.get(task))
        finally:
            del self._running[task]

    def _lacking(self, needs: Mapping[str, float]) -> str | None:
        """Why no node can ever run a cell, which Ray would wait for; ``None`` if one can."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(n, 0) >= needs[n] for n in needs) for node in nodes):
            return None
        told = ", ".join(f"{name} {number:g}" for name, number in needs.items())
        return f"none of the {len(nodes)} nodes of the cluster has {told}"


def _check_reachable(address: str | None) -> None:
    """Say at once that nobody is at an address; Ray tries it for minutes."""
    host, colon, port = (address or "").partition("://")[0].rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except OSError as error:
            raise UsageError(
                f"there is no Ray cluster at {address}: {error}", "See ray status."
            ) from error


def _needs_of(cell: Cell) -> dict[str, float]:
    needs = {**cell.resources, "CPU": cell.cores or 1}
    if cell.memory_limit is not None:
        needs["memory"] = cell.memory_limit * 10**9
    return needs
