"""What a sweep costs, what kills do to it, and what a large ledger costs to read.

python benchmarks/sweep.py cells [FOLDER]    200 cells, against a process each; and again
python benchmarks/sweep.py kill [FOLDER]     50 kills of drivers and workers at random moments
python benchmarks/sweep.py nodes [FOLDER]    waiting cells on one and two simulated nodes of Ray
python benchmarks/sweep.py ledger [FOLDER]   compare and draw a ledger of 100,000 cells
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

CELLS, MODELS, ALONE = 200, ("gpt2", "llama", "gpt_neox", "qwen2"), 20
COMMAND = [sys.executable, "-m", "qeff_proxy"]
_PR_SET_CHILD_SUBREAPER = 36


def measured(words: list[str], **more: Any) -> tuple[float, float, int]:
    """Wall and CPU seconds of a command with all that it started, and its exit code."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, start = spent(), time.perf_counter()
    code = subprocess.run(
        [*COMMAND, *words], stdout=subprocess.DEVNULL, check=False, **more
    ).returncode
    wall = time.perf_counter() - start
    while True:  # the process that cells are forked from ends after the sweep
        try:
            os.wait()
        except ChildProcessError:
            return wall, spent() - before, code


def cells(folder: Path) -> None:
    """Cells of four models of two layers, and 20 of them in a process each."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import small_model

    for name in MODELS:
        small_model(name).save_pretrained(folder / "models" / name)
    inputs = [[(7 * row + 3 * place) % 97 + 3 for place in range(6)] for row in range(50)]
    plan = folder / "plan.toml"
    tables = "".join(f"i{row:02} = {{ids = [{ids}]}}\n" for row, ids in enumerate(inputs))
    plan.write_text(
        f'[models.all]\nsource = "models/*"\n[settings.s]\nmax_new_tokens = 4\n[inputs]\n{tables}'
    )
    alone: dict[str, list[tuple[float, float]]] = {name: [] for name in MODELS}
    home = {**os.environ, "QEFF_HOME": str(folder / "home-alone")}
    for place in range(ALONE // len(MODELS)):
        for name in MODELS:
            ids = ",".join(map(str, inputs[place]))
            words = ["verify", str(folder / "models" / name), "--ids", ids, "--max-new-tokens", "4"]
            wall, cpu, code = measured([*words, "--html", str(folder / "r.html")], env=home)
            assert code == 0
            alone[name].append((wall, cpu))
    totals = []
    for unit in (0, 1):  # the first of each model exports it
        firsts = sum(times[0][unit] for times in alone.values())
        others = [each[unit] for times in alone.values() for each in times[1:]]
        totals.append(firsts + sum(others) / len(others) * (CELLS - len(MODELS)))
        kind = ("wall", "CPU")[unit]
        mean = sum(others) / len(others)
        print(f"alone, {kind}: first {firsts / len(MODELS):.1f} s, others {mean:.2f} s each")
    home = {**os.environ, "QEFF_HOME": str(folder / "home-sweep")}
    wall, cpu, code = measured(["sweep", str(plan)], env=home, stderr=subprocess.DEVNULL)
    assert code == 0
    print(
        f"{CELLS} cells: {wall:.0f} s, {cpu:.0f} CPU s; one by one, scaled from {ALONE}: "
        f"{totals[0]:.0f} s, {totals[1]:.0f} CPU s; ratio {wall / totals[0]:.2f} of the wall "
        f"clock, {cpu / totals[1]:.2f} of the CPU, {cpu / totals[1] / 2:.2f} on two free cores"
    )
    for _ in range(3):
        wall, cpu, code = measured(["sweep", str(plan)], env=home, stderr=subprocess.DEVNULL)
        print(f"the same again: {wall:.2f} s, {cpu:.2f} CPU s")


def kill(folder: Path) -> None:
    """Sweeps whose driver or one of whose workers is killed."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sweep"))
    from conftest import EXECUTOR

    (folder / "quick_executor.py").write_text(EXECUTOR)
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qeff_proxy.executors]\nquick = quick_executor:Quick\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    count = 400
    names = "".join(f'm{place:03} = "./none-{place}"\n' for place in range(count))
    plan, ledger = folder / "plan.toml", folder / "ledger.jsonl"
    plan.write_text(f"[models]\n{names}[backends.nonesuch]\n")
    words = [*COMMAND, "sweep", str(plan), "--on", "quick", "--workers", "2", "--json"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    killed: Counter[str] = Counter()
    chance = random.Random(0)
    while sum(killed.values()) < 50:
        before = ledger.stat().st_size if ledger.exists() else 0
        driver = subprocess.Popen(words, **quiet)  # type: ignore[call-overload]
        while driver.poll() is None and (not ledger.exists() or ledger.stat().st_size == before):
            time.sleep(0.01)  # a sweep that has not begun loses nothing
        time.sleep(chance.random() * 0.3)
        if sum(killed.values()) % 2:
            for child in below(driver.pid)[::-1]:
                try:
                    if os.getsid(child) == child:
                        os.kill(child, signal.SIGKILL)
                        killed["worker"] += 1
                        break
                except ProcessLookupError:
                    continue
            time.sleep(chance.random() * 0.3)
        if driver.poll() is None:
            driver.kill()
            killed["driver"] += 1
        driver.wait()
    time.sleep(1)
    subprocess.run(words, check=False, **quiet)  # type: ignore[call-overload]
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    passed = Counter(record["name"] for record in records if record["verdict"] == "passed")
    print(
        f"{dict(killed)} killed: {count - len(passed)} of {count} cells lost, "
        f"{sum(number > 1 for number in passed.values())} doubled, 0 half recorded"
    )


def below(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    children = parents.get(process, [])
    return children + [inner for child in children for inner in below(child)]


NODES = """
import sys, time
import msgspec
import ray
from ray.cluster_utils import Cluster
from qeff_proxy.sweep import read_plan, run_sweep
from qeff_proxy.sweep.ray_executor import RayExecutor

class Waiting(RayExecutor):
    def submit(self, job):
        return super().submit(msgspec.structs.replace(job, work="waiting_cells:wait"))

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
for _ in range(int(sys.argv[2]) - 1):
    cluster.add_node(num_cpus=2)
ray.init(cluster.address, logging_level="ERROR")  # so that workers outlive a sweep
for _ in range(2):  # in the first, workers start
    start = time.perf_counter()
    executor = Waiting(None, None)
    sweep = run_sweep(read_plan(sys.argv[1]), on=lambda _: executor, again=["*"])
    assert sweep.passed and len(sweep.ran) == 24
    print(f"{time.perf_counter() - start:.2f}", flush=True)
ray.shutdown()
cluster.shutdown()
"""


def nodes(folder: Path) -> None:
    """24 cells that wait for 10 s, on nodes of two CPUs; in the environment of `make test-ray`."""
    (folder / "waiting_cells.py").write_text(
        "import time\ndef wait(job):\n    time.sleep(10)\n    return job.record('passed'), None\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    models = "".join(f'm{place:02} = "./none-{place}"\n' for place in range(24))
    (folder / "plan.toml").write_text(f"[models]\n{models}[backends.nonesuch]\n")
    seconds = []
    for count in (1, 2):
        words = [sys.executable, "-c", NODES, str(folder / "plan.toml"), str(count)]
        said = subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": path, "RAY_worker_niceness": "0"},
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds.append(float(said.stdout.split()[-1]))
    print(
        f"one node {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {seconds[0] / seconds[1]:.2f} times"
    )


def ledger(folder: Path) -> None:
    """500 cells in each of 200 nights, of 32 layers each."""
    chance, sketch = random.Random(0), [1.125, -2.25, 33.5, -4.75]
    path = folder / "ledger.jsonl"
    names = [f"model-{place // 10:02}/backend-{place % 10}/default/example" for place in range(500)]
    with path.open("w") as file, path.with_suffix(".nights.jsonl").open("w") as nights:
        for night in range(200):
            called = f"2026-{night // 28 + 1:02}-{night % 28 + 1:02}T02-00-00-aaaa"
            ids = {name: f"{place:032}{night:032}" for place, name in enumerate(names)}
            nights.write(json.dumps({"night": called, "plan": "plan.toml", "cells": ids}) + "\n")
            for name in names:
                error = (
                    1e-4 * math.exp(chance.gauss(0, 0.05)) * (4 if chance.random() < 0.001 else 1)
                )
                layers = [
                    {"at": f"body layer {n}", "error": error * (n + 1) / 32, "sqnr": 90.0 - n / 10}
                    for n in range(32)
                ]
                tensors = {
                    f"body.out.hidden_states.layer-{n:02}": ["0a1b2c3d", 1.0, 4.0, *sketch]
                    for n in range(32)
                }
                record = {
                    "id": ids[name], "name": name, "night": called, "verdict": "passed",
                    "time": called[:13] + ":00:00Z", "error": error, "worst": "lm_head.out.logits",
                    "sqnr": 80.0, "layers": layers, "seconds": {"running x": 10.0, "total": 20.0},
                    "versions": {"torch": "2.13.0", "sdk": str(night // 30)},
                    "fingerprint": tensors,
                }  # fmt: skip
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"ledger: {path.stat().st_size / 1e6:.0f} MB, {len(names) * 200} cells")
    page = folder / "page.html"
    for words in (["diff", str(path)], ["report", str(path), "--html", str(page)]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([*COMMAND, "sweep", *words], stdout=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"sweep {words[0]}: {time.perf_counter() - start:.1f} s, {cpu:.1f} CPU s, "
            f"{after.ru_maxrss / 1e6:.2f} GB"
        )
    print(f"page: {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    try:
        {"cells": cells, "kill": kill, "nodes": nodes, "ledger": ledger}[sys.argv[1]](place)
    finally:
        if len(sys.argv) <= 2:
            shutil.rmtree(place)
