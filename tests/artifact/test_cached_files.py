"""What lies in the cache, what of it is chosen, and that what is in use stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.artifact.cached_files import choose, list_cache, remove
from qeff_proxy.cli import main
from qeff_proxy.sweep.ledger import Ledger, Record

DAY = 86400.0
FIRST, SECOND = "first-0123456789abcdef", "second-fedcba9876543210"


def make(folder: Path, days: float, **sizes: int) -> Path:
    """A folder of files that were last used so many days ago."""
    folder.mkdir(parents=True)
    for name, size in sizes.items():
        (folder / name.replace("_", ".")).write_bytes(bytes(size))
    age(folder, days)
    return folder


def age(folder: Path, days: float) -> None:
    then = time.time() - days * DAY
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two exports, one with all that an export can have, and what a killed run left."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("QEFF_HOME", str(cache))
    first = make(cache / FIRST, 40, export_json=10, body_onnx=990)
    make(first / "compiled" / "onnxruntime-0123456789ab", 30, compile_json=200)
    make(first / "io" / "run", 35, manifest_json=300)
    make(first / "io" / "by-layer-0123456789ab", 20, a_npz=400)
    make(cache / SECOND, 2, export_json=5000)
    make(cache / f".{FIRST}.partial-0123456789ab", 3, body_onnx=70)
    make(cache / "not-of-ours", 90, file=1)
    return cache


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["cache", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_is_listed_with_size_and_age(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    told = {
        (e["kind"], Path(e["path"]).name): (e["size"], round((time.time() - e["last_use"]) / DAY))
        for e in found["entries"]
    }
    assert told == {
        ("export", FIRST): (1000, 20),
        ("compiled", "onnxruntime-0123456789ab"): (200, 30),
        ("dump", "run"): (300, 35),
        ("journal", "by-layer-0123456789ab"): (400, 20),
        ("export", SECOND): (5000, 2),
        ("leftover", f".{FIRST}.partial-0123456789ab"): (70, 3),
    }
    assert not any(entry["in_use"] for entry in found["entries"])
    assert found["size"] == 6970
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert f"{FIRST}/compiled/onnxruntime-0123456789ab" in said
    assert "6 entries, 7.0 kB in" in said


def names(entries: Any) -> list[str]:
    return [entry.path.name for entry in entries]


def test_age_size_kind_and_names_choose(cache: Path) -> None:
    entries, now = list_cache(), time.time()
    inner = ["run", "onnxruntime-0123456789ab"]
    assert names(choose(entries, unused_since=now - 25 * DAY)) == inner
    assert names(choose(entries, unused_since=now - 10 * DAY)) == [FIRST]
    assert names(choose(entries, most=6970)) == []
    assert names(choose(entries, most=6600)) == inner
    assert names(choose(entries, most=5070)) == [FIRST]
    assert names(choose(entries, most=5000)) == [FIRST, f".{FIRST}.partial-0123456789ab"]
    assert names(choose(entries, most=5000, kinds=["dump", "export"])) == [FIRST, SECOND]
    assert names(choose(entries, kinds=["dump"])) == ["run"]
    assert names(choose(entries, exports=[SECOND])) == [SECOND]


def test_pruning_removes_what_was_chosen_and_nothing_else(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in cache.rglob("*"))
    assert len(listed(capsys, "--older-than", "25d")["entries"]) == 2
    assert sorted(path.name for path in cache.rglob("*")) == before
    assert len(listed(capsys, "--older-than", "25d", "--prune")["removed"]) == 2
    assert not (cache / FIRST / "compiled" / "onnxruntime-0123456789ab").exists()
    assert (cache / FIRST / "io" / "by-layer-0123456789ab" / "a.npz").is_file()
    assert main(["cache", "--older-than", "1d", "--prune"]) == 0
    assert "4 entries removed, of 4 entries" in capsys.readouterr().out
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"not-of-ours"}


def test_the_exports_of_a_sweep_are_chosen_by_its_ledger(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(
        Record(id="a", name="m/b/s/i", night="n", time="t", verdict="passed", export=SECOND)
    )
    found = listed(capsys, "--sweep", str(ledger.path), "--prune")
    assert found["removed"] == [str(cache / SECOND)]


HOLD = {
    "a file that is open": "file = open(sys.argv[1] + '/body.onnx')",
    "a file that is mapped": (
        "import mmap\nwith open(sys.argv[1] + '/body.onnx') as file:\n"
        "    kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)"
    ),
    "the lock of an export": (
        "from qeff_proxy.common.atomic_folder import locked\n"
        "lock = locked(pathlib.Path(sys.argv[1]))\nlock.__enter__()"
    ),
    "the lock of a compilation": (
        "from qeff_proxy.common.atomic_folder import locked\n"
        "lock = locked(pathlib.Path(sys.argv[1]) / 'compiled' / 'new-0123456789ab')\n"
        "lock.__enter__()"
    ),
    "a journal": (
        "from qeff_proxy.common.atomic_folder import held\n"
        "lock = held(pathlib.Path(sys.argv[1]) / 'io' / 'by-layer-0123456789ab')\n"
        "assert lock.__enter__()"
    ),
}


@pytest.mark.parametrize("code", HOLD.values(), ids=HOLD)
def test_what_another_process_uses_stays(code: str, cache: Path) -> None:
    entry = next(each for each in list_cache() if each.path.name == FIRST)
    assert not entry.in_use
    words = [
        sys.executable,
        "-c",
        f"import pathlib, sys\n{code}\nprint('ready', flush=True)\ninput()",
    ]
    with subprocess.Popen(
        [*words, str(entry.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        age(cache, 30)
        now_used = next(each for each in list_cache() if each.path.name == FIRST)
        assert now_used.in_use
        assert FIRST not in names(choose(list_cache()))
        assert not remove(entry)  # chosen before it was used
        process.communicate("\n")
    assert remove(entry)
    assert not entry.path.exists()


def test_a_look_up_counts_as_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_export: Path
) -> None:
    from qeff_proxy.artifact.export_folder import read_export
    from qeff_proxy.backends.compile_export import compile_export

    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / FIRST
    shutil.copytree(demo_export, folder, ignore=shutil.ignore_patterns("io", "compiled"))
    compile_export(read_export(folder))
    before = {entry.kind: entry.last_use for entry in list_cache()}
    assert set(before) == {"export", "compiled"}
    time.sleep(0.05)
    assert compile_export(read_export(folder)).was_there
    after = {entry.kind: entry.last_use for entry in list_cache()}
    assert all(after[kind] > before[kind] for kind in before)
    assert all(entry.in_use for entry in list_cache())  # not long ago


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--prune"], "--prune needs to know what to remove"),
        (["--older-than", "30"], "'30' is not a number with a unit"),
        (["--max-size", "3 lb"], "'3 lb' is not a number with a unit"),
        (["--sweep", "none.jsonl"], "there is no ledger none.jsonl"),
    ],
)
def test_wrong_options_are_refused(words: list[str], error: str, cache: Path, capsys: Any) -> None:
    assert main(["cache", *words]) == 2
    assert error in capsys.readouterr().err
