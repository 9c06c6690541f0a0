"""Where cells run: executors, which packages may add as entry points of ``qeff_proxy.executors``.

The core's are ``local`` (processes of this machine), ``ray`` and ``slurm``. A package registers a
class::

    [project.entry-points."qeff_proxy.executors"]
    cluster = "my_package.cluster:ClusterExecutor"

It starts cells there by `qeff_proxy.sweep.watch_cell.run_remote`, and
`qeff_proxy.testing.executors.ExecutorSuite` decides whether it works.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, cast

from qeff_proxy.plugins.entry_points import find_entry, load_entry
from qeff_proxy.sweep.run_cell import Job, Outcome

ENTRY_POINT_GROUP = "qeff_proxy.executors"
BUILTIN_EXECUTORS = {
    "local": "qeff_proxy.sweep.local_executor:LocalExecutor",
    "ray": "qeff_proxy.sweep.ray_executor:RayExecutor",
    "slurm": "qeff_proxy.sweep.slurm_executor:SlurmExecutor",
}


class Executor(Protocol):
    """Runs cells elsewhere, within their limits.

    It is made with ``workers`` (cells at a time; ``None``: its own choice) and ``address`` (what
    follows the colon of ``--on NAME:ADDRESS``; ``None`` without).
    """

    @property
    def slots(self) -> int:
        """Cells that it runs at the same time; no more are submitted."""

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a cell. A cell that dies or leaves its limits has a record that says so.

        The future raises only where the executor itself failed; the cell then runs again in the
        next sweep.
        """

    def close(self) -> None:
        """Kill the cells that run, and release what it holds."""


def load_executor(name: str, workers: int | None = None) -> Executor:
    """Make the executor that ``NAME`` or ``NAME:ADDRESS`` names.

    Raises:
        PluginError: There is none, or it cannot be used.
        UsageError: The address is none of its.
    """
    word, _, address = name.partition(":")
    entry = find_entry(ENTRY_POINT_GROUP, "executor", word, BUILTIN_EXECUTORS)

    def made(target: Callable[..., Any]) -> Executor:
        return cast("Executor", target(workers=workers, address=address or None))

    return load_entry(entry, "executor", made)
