"""The conformance suite of executors: inherit `ExecutorSuite` in a test file of a few lines.

::

    from qeff_proxy.testing.executors import ExecutorSuite


    class TestMyExecutor(ExecutorSuite):
        executor = "my-executor"

pytest runs a dozen checks: records come back whole, cells run side by side in processes of their
own, each stays in its limits and ends with all that it started, and a worker that is not as the
sweep's machine says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qeff_proxy.sweep.executors import Executor, load_executor
from qeff_proxy.sweep.identify_cells import identify_cells
from qeff_proxy.sweep.ledger import Layer, Ledger, Record
from qeff_proxy.sweep.plan import read_plan
from qeff_proxy.sweep.run_cell import Job
from qeff_proxy.sweep.run_sweep import run_sweep

_WORK = "qeff_proxy.testing.executor_cells:run"
_LONG = 120.0  # seconds that a worker may take to start


class ExecutorSuite:
    """The checks of one executor.

    Attributes:
        executor: Its name, with its address where it needs one, or its class.
        remote: Its workers may be other machines, whose packages are compared.
    """

    executor: ClassVar[str | type[Any]]
    remote: ClassVar[bool] = True

    # What an author may override

    def make_executor(self, workers: int | None = 2) -> Executor:
        """A new instance, which runs two cells at a time."""
        made = self.executor
        return load_executor(made, workers) if isinstance(made, str) else made(workers=workers)

    @pytest.fixture(scope="class")
    @classmethod
    def running(cls) -> Iterator[Executor]:
        """An executor; shared by the checks of the class that do not close it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QEFF_PROXY_TEST", "of the sweep")
            executor = cls().make_executor()
            yield executor
            executor.close()

    # The checks

    def test_it_says_how_many_cells_it_takes(self, running: Executor) -> None:
        """As many as it was told."""
        assert running.slots == 2

    def test_records_come_back_whole(self, running: Executor, tmp_path: Path) -> None:
        """With fingerprints, and as the cell made them; what it prints changes nothing."""
        for model in ("plain", "talks"):
            record, fingerprint = self._run(running, _job(tmp_path, model))
            assert record.verdict == "passed", record.reason
            assert (record.reason, record.tokens) == ("", 3)
            assert record.layers == [Layer("é layer 0", 1.5e-7, None)]
            assert fingerprint == {"body.out.x": ["0a1b", 1.0, None]}
            assert (record.name, record.night) == (f"{model}/nonesuch/default/example", "n1")
            assert record.peak_memory is not None
            assert record.peak_memory > 1_000_000

    def test_each_cell_has_a_process_of_its_own(self, running: Executor, tmp_path: Path) -> None:
        """It knows nothing of the cells before it, and has this process's ``QEFF_`` variables."""
        jobs = [_job(tmp_path, f"own{place}") for place in range(3)]
        for job in jobs:
            record, _ = self._run(running, job)
            said = {"seen": job.cell.model, "variable": "of the sweep"}
            assert record.precision == str(said)
        assert len({(tmp_path / f"own{place}.pid").read_text() for place in range(3)}) == 3

    def test_cells_run_side_by_side(self, running: Executor, tmp_path: Path) -> None:
        """Two cells that wait for each other end."""
        futures = [running.submit(_job(tmp_path, f"pair{place}")) for place in (1, 2)]
        assert [future.result(_LONG)[0].verdict for future in futures] == ["passed"] * 2

    def test_a_cell_that_dies_is_named(self, running: Executor, tmp_path: Path) -> None:
        """With how its process ended, and what it said last."""
        record, _ = self._run(running, _job(tmp_path, "dies"))
        assert record.verdict == "killed", record.reason
        assert record.reason == "its process ended by SIGSEGV; it said: about to die"
        record, _ = self._run(running, _job(tmp_path, "raises"))
        assert record.verdict == "killed", record.reason
        assert "a defect of the cell" in record.reason

    def test_a_cell_that_hangs_is_ended(self, running: Executor, tmp_path: Path) -> None:
        """With all that it started."""
        record, _ = self._run(running, _job(tmp_path, "hangs", time_limit=3.0))
        assert record.verdict == "time-out", record.reason
        assert "not done within its 3 s" in record.reason
        _check_ended(tmp_path, "hangs.pid", "hangs.child")

    def test_a_cell_that_grows_is_ended(self, running: Executor, tmp_path: Path) -> None:
        """Where it leaves its memory."""
        record, _ = self._run(running, _job(tmp_path, "grows", memory_limit=1.2))
        assert record.verdict == "out of memory", record.reason
        _check_ended(tmp_path, "grows.pid")

    def test_a_wrong_worker_says_so(self, running: Executor, tmp_path: Path) -> None:
        """A cell that the sweep knows by other versions is not run."""
        if not self.remote:
            return
        job = _job(tmp_path, "elsewhere", versions={"acme-sdk": "7"}, identity="0" * 64)
        record, _ = self._run(running, job)
        assert record.verdict == "wrong worker", record.reason
        assert "acme-sdk none, not 7" in record.reason
        assert not (tmp_path / "elsewhere.pid").exists()

    def test_a_sweep_runs_on_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A real model passes, a backend that is not there is refused, and each is kept."""
        model = files("qeff_proxy") / "checkpoints" / "tiny-gpt2"
        monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
        plan = tmp_path / "plan.toml"
        plan.write_text(
            f"[models]\nm = '{model}'\n[backends.onnxruntime]\n[backends.nonesuch]\n"
            "[settings.s]\nmax_new_tokens = 2\n[inputs]\na = {ids = [[3, 5, 7]]}\n"
            "b = {ids = [[2, 4]]}\n"
        )
        sweep = run_sweep(read_plan(plan), on=self.make_executor, workers=2)
        verdicts = {name: record and record.verdict for name, record in sweep.records.items()}
        assert verdicts == {
            "m/onnxruntime/s/a": "passed",
            "m/onnxruntime/s/b": "passed",
            "m/nonesuch/s/a": "refused",
            "m/nonesuch/s/b": "refused",
        }
        records = list(Ledger(tmp_path / "ledger.jsonl").new_records())
        assert sorted(record.name for record in records) == sorted(verdicts)
        passed = next(record for record in records if record.verdict == "passed")
        assert [layer.at for layer in passed.layers] == [f"body layer {n}" for n in range(3)]
        assert passed.report is not None
        assert (tmp_path / passed.report).is_file()
        assert run_sweep(read_plan(plan), on=self.make_executor).ran == []

    def test_closing_ends_what_runs(self, tmp_path: Path) -> None:
        """Soon, and with all that the cells have started."""
        executor = self.make_executor()
        try:
            future = executor.submit(_job(tmp_path, "hangs"))
            _wait_for(lambda: (tmp_path / "hangs.child").exists())
        finally:
            executor.close()
        with suppress(Exception):
            assert future.result(10)[0].verdict == "killed"
        assert future.done()
        _check_ended(tmp_path, "hangs.pid", "hangs.child")

    def _run(self, executor: Executor, job: Job) -> tuple[Record, dict[str, Any] | None]:
        outcome = executor.submit(job).result(_LONG)
        assert not job.dumps.exists()
        return outcome


def _job(
    folder: Path,
    model: str,
    *,
    time_limit: float = _LONG,
    memory_limit: float | None = None,
    versions: dict[str, str] | None = None,
    identity: str | None = None,
) -> Job:
    """A job of a cell that loads nothing."""
    limit = f"memory_limit = {memory_limit}\n" if memory_limit else ""
    plan = folder / "plan.toml"
    plan.write_text(
        f"time_limit = {time_limit}\n{limit}[models]\n{model} = './none'\n[backends.nonesuch]\n"
    )
    (cell,) = read_plan(plan).cells
    known = identify_cells([cell])[cell.name]
    return Job(cell, identity or known.id, "n1", versions or known.versions, folder, work=_WORK)


def _wait_for(condition: Callable[[], bool], seconds: float = _LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _check_ended(folder: Path, *names: str) -> None:
    """The processes whose numbers are in these files have ended, or end now."""
    processes = [int((folder / name).read_text()) for name in names]
    _wait_for(lambda: not any(map(_is_running, processes)), 45)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"
