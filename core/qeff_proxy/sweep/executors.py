"""Where cells run: executors, which packages may add as entry points of ``qeff_proxy.executors``.

The core's are ``local`` (processes of this machine). A package registers a class::

    [project.entry-points."qeff_proxy.executors"]
    cluster = "my_package.cluster:ClusterExecutor"
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeAlias, cast

from qeff_proxy.plugins.entry_points import find_entry, load_entry
from qeff_proxy.sweep.ledger import Record
from qeff_proxy.sweep.run_cell import Job

ENTRY_POINT_GROUP = "qeff_proxy.executors"
BUILTIN_EXECUTORS = {"local": "qeff_proxy.sweep.local_executor:LocalExecutor"}

#: A record, and the fingerprint of the run where there is one.
Outcome: TypeAlias = tuple[Record, dict[str, Any] | None]


class Executor(Protocol):
    """Runs `qeff_proxy.sweep.run_cell` elsewhere, within the limits of the cell.

    It is made with ``workers`` (cells at a time; ``None``: its own choice) and ``address`` (what
    follows the colon of ``--on NAME:ADDRESS``; ``None`` without).

    Attributes:
        slots: Cells that it runs at the same time; no more are submitted.
    """

    slots: int

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a cell. A cell that dies or leaves its limits has a record that says so."""

    def close(self) -> None:
        """Kill the cells that run, and release what it holds."""


def load_executor(name: str, workers: int | None = None) -> Executor:
    """Make the executor that ``NAME`` or ``NAME:ADDRESS`` names.

    Raises:
        PluginError: There is none, or it cannot be used.
    """
    word, _, address = name.partition(":")
    entry = find_entry(ENTRY_POINT_GROUP, "executor", word, BUILTIN_EXECUTORS)

    def made(target: Callable[..., Any]) -> Executor:
        return cast("Executor", target(workers=workers, address=address or None))

    return load_entry(entry, "executor", made)
