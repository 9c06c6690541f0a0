"""Each executor against the conformance suite, and how the local one shares its machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qeff_proxy.cli import main
from qeff_proxy.sweep import read_plan
from qeff_proxy.sweep.local_executor import LocalExecutor
from qeff_proxy.sweep.plan import Cell
from qeff_proxy.sweep.run_cell import Job, decode_job, decode_outcome, encode_job
from qeff_proxy.sweep.slurm_executor import SlurmExecutor, _parameters_of
from qeff_proxy.sweep.watch_cell import run_remote
from qeff_proxy.testing.executors import ExecutorSuite, _check_ended, _job, _wait_for

WritePlan = Callable[..., Path]


class TestLocal(ExecutorSuite):
    executor = "local"
    remote = False


class LocalSlurm(SlurmExecutor):
    """Jobs as submitit runs them without Slurm."""

    cluster = "local"


class TestSlurm(ExecutorSuite):
    executor = LocalSlurm


def test_a_cell_ends_with_all_it_started_when_its_watcher_is_killed(tmp_path: Path) -> None:
    message = encode_job(_job(tmp_path, "hangs"))
    code = (
        f"from qeff_proxy.sweep.watch_cell import run_remote; run_remote({message!r}, again=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as watcher:
        _wait_for(lambda: (tmp_path / "hangs.child").exists())
        watcher.kill()
    _check_ended(tmp_path, "hangs.pid", "hangs.child")


@pytest.fixture
def cell(write_plan: WritePlan) -> Cell:
    return read_plan(write_plan(cells=1)).cells[0]


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalExecutor]:
    """Makes a local executor on a machine of 8 cores and so much memory."""

    def make(gigabytes: float, workers: int | None = None) -> LocalExecutor:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
        monkeypatch.setattr(
            "qeff_proxy.sweep.local_executor.free_memory", lambda: int(gigabytes * 10**9)
        )
        return LocalExecutor(workers)

    return make


@pytest.mark.parametrize(
    ("gigabytes", "workers", "slots", "each"),
    [(64, None, 8, 1), (9, None, 4, 2), (1, None, 1, 8), (1, 3, 3, 2), (64, 16, 16, 1)],
)
def test_the_pool_is_as_large_as_cores_and_memory(
    make_pool: Any, cell: Cell, gigabytes: float, workers: int | None, slots: int, each: int
) -> None:
    pool = make_pool(gigabytes, workers)
    assert pool.slots == slots
    with ExitStack() as stack:
        shares = [stack.enter_context(pool._share_of(cell)) for _ in range(slots)]
        assert {len(share) for share in shares} == {each}
        if slots <= 8:
            assert len(set().union(*shares)) == slots * each  # none has another's


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ({"memory_limit": 6}, {"memory_limit": 6}, True),
        ({"memory_limit": 6}, {"memory_limit": 4}, False),
        ({"memory_limit": 99}, {}, False),
        ({"memory_limit": 99}, {"memory_limit": 0.1}, True),
        ({"resources": {"npu": 1}}, {"resources": {"npu": 1}}, True),
        ({"resources": {"npu": 0.5}}, {"resources": {"npu": 0.5}}, False),
        ({"resources": {"npu": 1}}, {"resources": {"gpu": 1}}, False),
        ({"cores": 5}, {"cores": 4}, True),
        ({"cores": 99}, {}, True),
    ],
)
def test_a_cell_waits_for_what_it_needs(
    make_pool: Any, cell: Cell, first: Any, second: Any, waits: bool
) -> None:
    pool = make_pool(10, 8)
    one, two = (msgspec.structs.replace(cell, **needs) for needs in (first, second))
    begun = threading.Event()

    def run_second() -> None:
        with pool._share_of(two):
            begun.set()

    thread = threading.Thread(target=run_second)
    with pool._share_of(one):
        thread.start()
        assert begun.wait(0.2 if waits else 10) is not waits
    thread.join(10)
    assert begun.is_set()


def test_a_machine_without_the_folder_says_so(cell: Cell, tmp_path: Path) -> None:
    job = Job(cell, "0" * 64, "n", {}, tmp_path / "elsewhere")
    assert decode_job(encode_job(job)) == job
    record, _ = decode_outcome(run_remote(encode_job(job)))
    assert record.verdict == "wrong worker"
    assert f"has no folder {tmp_path / 'elsewhere'}: the ledger's must be shared" in record.reason
    assert not job.folder.exists()


def test_jobs_of_slurm_ask_for_what_a_cell_needs(cell: Cell) -> None:
    needs = {"time_limit": 90.0, "memory_limit": 6.5, "cores": 3, "resources": {"npu": 2}}
    assert _parameters_of(msgspec.structs.replace(cell, **needs)) == {
        "name": "qeff-proxy",
        "timeout_min": 12,
        "cpus_per_task": 3,
        "mem_gb": 9,
        "slurm_gres": "npu:2",
    }
    executor = LocalSlurm(address="partition=npu,qos=low")
    assert executor._parameters == {"slurm_partition": "npu", "slurm_qos": "low"}
    executor.close()


@pytest.mark.parametrize(
    ("on", "path", "error"),
    [
        ("local:there", None, "local runs on this machine, not at there"),
        ("slurm", "", "there is no srun on this machine"),
        ("slurm:partition", None, "has 'partition', which is no NAME=VALUE of submitit"),
        ("slurm:colour=red", None, "has 'colour', which is no NAME=VALUE of submitit"),
        ("ray", None, "Ray cannot be imported"),
    ],
)
def test_what_is_not_there_is_said(
    write_plan: WritePlan,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
    on: str,
    path: Any,
    error: str,
) -> None:
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if path is None else path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", str(write_plan(cells=1)), "--on", on]) != 0
    assert error in capsys.readouterr().err
    assert not (tmp_path / "ledger.jsonl").exists()
