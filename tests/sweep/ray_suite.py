"""The executor of Ray against the conformance suite and lost nodes: `make test-ray`.

Nodes are simulated on this machine, each with a raylet, a store and workers of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.sweep import Ledger, read_plan, run_sweep
from qeff_proxy.sweep.ray_executor import RayExecutor
from qeff_proxy.testing.executors import ExecutorSuite
from ray.cluster_utils import Cluster

CELLS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes of a CPU each; ``RAY_ADDRESS`` is its address."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
    made.shutdown()


@pytest.mark.usefixtures("cluster")
class TestRay(ExecutorSuite):
    executor = "ray"


class Waiting(RayExecutor):
    """Cells that wait for a second, and write down that they began."""

    def submit(self, job: Any) -> Any:
        import msgspec

        return super().submit(msgspec.structs.replace(job, work="waiting_cells:wait"))


WAITING = """
import os, time
def wait(job):
    with open(job.folder / "began.txt", "a") as file:
        file.write(f"{job.cell.name}\\n")
    time.sleep(SECONDS)
    return job.record("passed"), None
"""


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of cells that wait."""
    (tmp_path / "waiting_cells.py").write_text(WAITING.replace("SECONDS", "3"))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    plan = tmp_path / "plan.toml"
    models = "".join(f'm{place:02} = "./none-{place}"\n' for place in range(CELLS))
    plan.write_text(f"[models]\n{models}[backends.nonesuch]\n")
    return plan


def sweep_on(plan: Path, **more: Any) -> Any:
    return run_sweep(read_plan(plan), on=Waiting, **more)


def began(plan: Path) -> Counter[str]:
    path = plan.parent / "ledger" / "began.txt"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def test_a_lost_node_costs_its_cells_a_retry_and_nothing_else(
    cluster: Cluster, waiting: Path
) -> None:
    node = cluster.add_node(num_cpus=2)
    lost: list[str] = []

    def lose(line: str) -> None:
        if not lost and sum(began(waiting).values()) >= 4:
            lost.append(line)
            cluster.remove_node(node, allow_graceful=False)

    sweep = sweep_on(waiting, progress=lose)
    assert lost
    assert sweep.passed
    records = list(Ledger(waiting.parent / "ledger.jsonl").new_records())
    assert Counter(record.verdict for record in records) == {"passed": CELLS}
    assert len({record.name for record in records}) == CELLS
    again = {name: number for name, number in began(waiting).items() if number > 1}
    assert 1 <= len(again) <= 2  # the node ran two
    assert set(again.values()) == {2}


def test_what_no_node_has_is_said(cluster: Cluster, waiting: Path) -> None:
    text = waiting.read_text().replace("[backends.nonesuch]", "[backends.a]\n[backends.b]")
    waiting.write_text(f"{text}resources = {{npu = 1}}\n")
    sweep = sweep_on(waiting)
    verdicts = Counter((n.split("/")[1], r.verdict) for n, r in sweep.records.items())
    assert verdicts == {("a", "passed"): CELLS, ("b", "wrong worker"): CELLS}
    reason = sweep.records["m00/b/default/example"].reason
    assert reason == "none of the 2 nodes of the cluster has npu 1, CPU 1"


def test_an_address_without_a_cluster_is_refused(
    waiting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(waiting), "--on", "ray:127.0.0.1:1"]) == 2
    assert "there is no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
