"""Sweeps of cells that load nothing: what runs, what is kept, limits, kills and rivals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep import Ledger, read_plan, run_sweep
from qeff_proxy.sweep.compare_nights import compare_nights
from qeff_proxy.sweep.run_sweep import cells_of

pytestmark = pytest.mark.one_home

WritePlan = Callable[..., Path]


def verdicts(path: Path) -> dict[str, str]:
    return {record.name.partition("/")[0]: record.verdict for record in Ledger(path).new_records()}


def run_quick(path: Path, **more: Any) -> Any:
    return run_sweep(read_plan(path), on="quick", workers=2, **more)


def running(*words: str) -> list[int]:
    """Processes whose command line has all these words."""
    lines = ((p, p / "cmdline") for p in Path("/proc").iterdir() if p.name.isdigit())
    found = []
    for process, line in lines:
        try:
            command = line.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(word in command for word in words):
            found.append(int(process.name))
    return found


def test_what_the_ledger_has_is_not_run_again(write_plan: WritePlan) -> None:
    path = write_plan(cells=4)
    first = run_quick(path)
    assert (len(first.ran), first.passed) == (4, True)
    second = run_quick(path)
    assert (second.ran, second.passed) == ([], True)
    third = run_quick(path, again=["m02/*"])
    assert third.ran == ["m02/nonesuch/default/example"]
    ledger = Ledger(path.parent / "ledger.jsonl")
    nights = [record.night for record in ledger.new_records()]
    assert Counter(nights) == {first.night: 4, third.night: 1}
    assert [night.night for night in ledger.new_nights()] == [
        first.night,
        second.night,
        third.night,
    ]
    with pytest.raises(UsageError, match="no cell matches 'x'"):
        run_quick(path, again=["x"])


def test_some_cells_run_and_the_others_stay_as_they_are_known(
    write_plan: WritePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(cells=3)
    words = ["sweep", str(path), "--on", "quick", "--workers", "2"]
    assert main([*words, "--only", "m01/*", "--ledger", str(path.parent / "other.jsonl")]) == 0
    assert "1 cell: 1 passed; 1 ran now" in capsys.readouterr().out
    assert verdicts(path.parent / "other.jsonl") == {"m01": "passed"}
    assert not (path.parent / "ledger.jsonl").exists()
    run_quick(path)
    sweep = run_quick(path, only=["m00/*"], again=["*"])
    assert [*sweep.records] == sweep.ran == ["m00/nonesuch/default/example"]
    assert compare_nights(path.parent / "ledger.jsonl").changes == []  # none is missing


def test_shards_share_the_cells(write_plan: WritePlan) -> None:
    plan = read_plan(write_plan(cells=30))
    parts = [{cell.name for cell in cells_of(plan, (part, 3))} for part in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 30
    assert all(parts)


def test_shards_of_one_name_are_one_night(write_plan: WritePlan) -> None:
    path = write_plan(cells=4)
    for part in (1, 2):
        run_quick(path, shard=(part, 2), night="nightly-7")
    compared = compare_nights(path.parent / "ledger.jsonl")
    assert (compared.after, compared.before) == ("nightly-7", None)
    assert sorted(compared.records) == [f"m0{n}/nonesuch/default/example" for n in range(4)]
    with pytest.raises(UsageError, match=r"'\.\./x' cannot name a night"):
        run_quick(path, night="../x")


def test_cells_that_hang_die_or_grow_are_named_and_the_others_go_on(
    write_plan: WritePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(
        """
        time_limit = 20
        [models]
        hangs = {source = "./h", time_limit = 1}
        dies = "./d"
        grows = {source = "./g", memory_limit = 0.25}
        raises = "./r"
        fine = "./f"
        [backends.nonesuch]
        """
    )
    code = main(["sweep", str(path), "--on", "quick", "--workers", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    cells = {name.partition("/")[0]: cell for name, cell in result["cells"].items()}
    assert code == 1
    assert {name: cell["verdict"] for name, cell in cells.items()} == {
        "hangs": "time-out",
        "dies": "killed",
        "grows": "out of memory",
        "raises": "killed",
        "fine": "passed",
    }
    assert "not done within its 1 s" in cells["hangs"]["reason"]
    assert cells["dies"]["reason"] == "its process ended by SIGSEGV; it said: about to die"
    assert cells["grows"]["reason"] == "it was out of its memory limit of 0.25 GB"
    assert cells["grows"]["peak_memory"] > 250_000_000
    assert "a defect of the worker" in cells["raises"]["reason"]
    assert running("sleep", "321") == []  # what the cell had started ended with it
    again = run_quick(path)
    assert {name.partition("/")[0] for name in again.ran} == {"hangs", "dies", "grows", "raises"}


def drive(path: Path) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own."""
    code = (
        "import sys, pathlib\n"
        "from qeff_proxy.sweep import read_plan, run_sweep\n"
        "if __name__ == '__main__':\n"
        "    run_sweep(read_plan(sys.argv[1]), on='quick', workers=2)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE)


def check_kept(path: Path, cells: int) -> None:
    """No cell is lost, doubled or half recorded."""
    records = list(Ledger(path.parent / "ledger.jsonl").new_records())
    finished = Counter(record.name for record in records if record.verdict == "passed")
    assert len(finished) == cells
    assert set(finished.values()) == {1}
    for line in (path.parent / "ledger.jsonl").read_text().splitlines():
        json.loads(line)


def test_no_cell_is_lost_or_doubled_when_sweeps_are_killed(write_plan: WritePlan) -> None:
    """More of them: benchmarks/sweep.py kill."""
    path = write_plan(cells=24)
    chance = random.Random(1)
    ledger = path.parent / "ledger.jsonl"
    killed = 0
    for _ in range(5):
        before = ledger.stat().st_size if ledger.exists() else 0
        driver = drive(path)
        while driver.poll() is None and (not ledger.exists() or ledger.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.2)
        driver.kill()
        killed += driver.wait() == -signal.SIGKILL
        driver.communicate()
    assert killed >= 3
    deadline = time.monotonic() + 10
    while running(sys.executable, str(path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    run_quick(path)
    check_kept(path, 24)


def test_a_killed_worker_costs_its_cell_another_run_and_nothing_else(write_plan: WritePlan) -> None:
    models = "".join(f'slow{number} = "./none-{number}"\n' for number in range(12))
    path = write_plan(f"[models]\n{models}[backends.nonesuch]")
    driver, chance, killed = drive(path), random.Random(2), 0
    while driver.poll() is None and killed < 5:
        time.sleep(chance.random() * 0.1)
        for child in children_of(driver.pid)[::-1]:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                if os.getsid(child) == child:
                    os.kill(child, signal.SIGKILL)
                    killed += 1
                    break
    assert driver.wait(60) == 0
    driver.communicate()
    records = list(Ledger(path.parent / "ledger.jsonl").new_records())
    lost = [record for record in records if record.verdict == "killed"]
    assert lost
    assert {record.reason for record in lost} == {"its process ended by SIGKILL"}
    assert sorted(run_quick(path).ran) == sorted(record.name for record in lost)
    check_kept(path, 12)


def children_of(driver: int) -> list[int]:
    """The processes below a process."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    below = parents.get(driver, [])
    return below + [inner for each in below for inner in children_of(each)]


def test_two_sweeps_on_one_ledger_share_the_cells(write_plan: WritePlan) -> None:
    path = write_plan(cells=30)
    drivers = [drive(path), drive(path)]
    assert [driver.wait(60) for driver in drivers] == [0, 0]
    for driver in drivers:
        driver.communicate()
    check_kept(path, 30)
    assert (
        Counter((path.parent / "ledger" / "ran.txt").read_text().split()).most_common(1)[0][1] == 1
    )
    nights = {record.night for record in Ledger(path.parent / "ledger.jsonl").new_records()}
    assert len(nights) == 2


def test_ctrl_c_keeps_what_is_done_and_ends_what_runs(
    write_plan: WritePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan('[models]\nfine = "./f"\nhangs = "./h"\n[backends.nonesuch]')

    def interrupt(_record: object) -> None:
        raise KeyboardInterrupt

    sweep = run_quick(path, finished=interrupt)
    assert sweep.interrupted
    assert verdicts(path.parent / "ledger.jsonl") == {"fine": "passed"}
    assert running("sleep", "321") == []


def test_a_ledger_that_is_full_loses_one_result_and_says_so(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qeff_proxy.errors import ArtifactError

    path = write_plan(cells=3)
    original, failed = Ledger.append, []

    def full_once(self: Ledger, *arguments: Any) -> str | None:
        if not failed:
            failed.append(arguments[0].name)
            raise ArtifactError("cannot write: No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(Ledger, "append", full_once)
    sweep = run_quick(path)
    assert len(sweep.ran) == 2
    assert not sweep.passed
    assert sweep.notes == [
        f"the result of {failed[0]} is lost: cannot write: No space left on device"
    ]


def test_the_command_prints_cells_a_table_and_one_error(
    write_plan: WritePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(cells=2)
    assert main(["sweep", str(path), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "m01/nonesuch/default/example" in said.out
    assert "2 cells; nothing was run" in said.out
    assert "m01/nonesuch/default/example cannot run on this machine: " in said.out
    assert not (path.parent / "ledger.jsonl").exists()
    assert main(["sweep", str(path), "--dry-run", "--only", "m01/*"]) == 0
    assert "1 cell; nothing was run" in capsys.readouterr().out
    assert main(["sweep", str(path), "--on", "quick"]) == 0
    said = capsys.readouterr()
    assert "2 cells: 2 passed; 2 ran now" in said.out
    assert "m00/nonesuch/default/example passed in" in said.err
    for words, error in (
        (["--on", "nowhere"], "there is no executor 'nowhere'"),
        (["--shard", "3/2"], "--shard 3/2 is not I/N"),
        (["--workers", "0"], "--workers 0 runs no cell"),
        (["--markdown"], "--markdown has no use for a plan"),
    ):
        assert main(["sweep", str(path), "--again", "*", *words]) != 0
        assert error in capsys.readouterr().err
    assert main(["sweep", str(path.parent / "none.toml")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
