"""Each executor against the conformance suite, and how the local one shares its machine."""

from __future__ import annotations

from qeff_proxy.sweep.slurm_executor import SlurmExecutor
from qeff_proxy.testing.executors import ExecutorSuite


class TestLocal(ExecutorSuite):
    executor = "local"
    remote = False


class LocalSlurm(SlurmExecutor):
    """Jobs as submitit runs them without Slurm."""

    cluster = "local"


class TestSlurm(ExecutorSuite):
    executor = LocalSlurm
