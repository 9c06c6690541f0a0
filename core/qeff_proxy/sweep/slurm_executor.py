"""Run cells as jobs of Slurm, by submitit: ``--on slurm`` or ``--on slurm:partition=npu,qos=low``.

Needs ``qeff-proxy[slurm]``. A job asks for the cell's ``cores`` (else one), its ``memory_limit``
and a little more, its ``time_limit``, and its ``resources`` as ``gres``.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qeff_proxy.errors import PluginError, UsageError
from qeff_proxy.sweep.plan import Cell
from qeff_proxy.sweep.run_cell import Job, Outcome, decode_outcome, encode_job
from qeff_proxy.sweep.watch_cell import run_remote

_SLOTS = 64  # jobs at a time
_POLL = 0.5  # seconds between two looks whether a job has ended; submitit asks Slurm less often
_PATIENCE = 10.0  # seconds that a cancelled job may take to end
_MORE_MINUTES = 10  # for imports, and to say that a cell was not done
_MORE_MEMORY = 2  # gigabytes, for the process that watches the cell


class SlurmExecutor:
    """Cells as jobs of Slurm.

    Attributes:
        cluster: What submitit calls it; ``local`` runs jobs on this machine, without Slurm.

    Args:
        workers: Jobs at a time, those that wait in the queue included; by default 64.
        address: Parameters of ``sbatch`` as ``NAME=VALUE,NAME=VALUE``.
    """

    cluster = "slurm"

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import submitit
        except ImportError as error:
            raise PluginError(
                f"submitit cannot be imported: {error}", "pip install 'qeff-proxy[slurm]'"
            ) from error
        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UsageError("there is no srun on this machine", "Use --on slurm where Slurm is.")
        known = submitit.SlurmExecutor._valid_parameters()  # noqa: SLF001 (no public name)
        pairs = [word.partition("=") for word in (address or "").split(",") if word]
        for name, _, value in pairs:
            if name not in known or not value:
                raise UsageError(
                    f"slurm:{address} has {name!r}, which is no NAME=VALUE of submitit",
                    f"Such as slurm:partition=npu,qos=low; known are {', '.join(sorted(known))}.",
                )
        self._submitit = submitit
        self._parameters = {f"slurm_{name}": value for name, _, value in pairs}
        self.slots = workers or _SLOTS
        self._closed = threading.Event()
        self._threads = ThreadPoolExecutor(self.slots, "sweep")

    def submit(self, job: Job) -> Future[Outcome]:
        """Hand a cell to Slurm."""
        return self._threads.submit(self._run, job)

    def close(self) -> None:
        """Cancel the jobs."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> Outcome:
        folder = job.folder / "jobs"
        executor = self._submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        executor.update_parameters(**_parameters_of(job.cell), **self._parameters)
        task = executor.submit(run_remote, encode_job(job), again=False)
        while not task.done() and not self._closed.wait(_POLL):
            pass
        if not task.done():
            task.cancel()
            end = time.monotonic() + _PATIENCE
            while not task.done() and time.monotonic() < end:
                time.sleep(_POLL)
            return job.record("killed", "the sweep was interrupted"), None
        outcome = decode_outcome(task.result())  # where it raises, the job's files tell more
        for path in folder.glob(f"{task.job_id}_*"):
            path.unlink(missing_ok=True)
        return outcome


def _parameters_of(cell: Cell) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "name": "qeff-proxy",
        "timeout_min": math.ceil(cell.time_limit / 60) + _MORE_MINUTES,
        "cpus_per_task": cell.cores or 1,
    }
    if cell.memory_limit is not None:
        parameters["mem_gb"] = math.ceil(cell.memory_limit) + _MORE_MEMORY
    if cell.resources:
        gres = ",".join(f"{name}:{number:g}" for name, number in cell.resources.items())
        parameters["slurm_gres"] = gres
    return parameters
