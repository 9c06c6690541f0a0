"""The ledger: appended line by line, read by others, repaired after a kill."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.sweep import Ledger
from qeff_proxy.sweep.ledger import Night, Record


def record(name: str = "m/b/s/i", night: str = "n1", **more: object) -> Record:
    values = {"id": "a" * 64, "time": "2026-01-01T00:00:00Z", "verdict": "passed", **more}
    return msgspec.convert({"name": name, "night": night, **values}, Record)


def test_each_cell_is_one_line_that_any_reader_of_json_takes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    assert ledger.append(record(error=0.5), {"t": ["h", 1.0]}) is None
    assert ledger.append(record("other/b/s/i")) is None
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["m/b/s/i", "other/b/s/i"]
    assert lines[0]["fingerprint"] == {"t": ["h", 1.0]}
    assert [r.name for r in ledger.new_records()] == ["m/b/s/i", "other/b/s/i"]
    assert list(ledger.new_records()) == []
    ledger.append(record("third/b/s/i"))
    assert [r.name for r in ledger.new_records()] == ["third/b/s/i"]
    assert ledger.fingerprints(["a" * 64])["a" * 64, "n1"] == {}  # of the last of that night


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_last_line_is_skipped_and_then_cut_off(tmp_path: Path, seed: int) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.append(record())
    whole = ledger.path.read_bytes()
    torn = whole[: random.Random(seed).randrange(1, len(whole) - 1)]
    ledger.path.write_bytes(whole + torn)
    assert len(list(Ledger(ledger.path).new_records())) == 1
    note = ledger.append(record("next/b/s/i"))
    assert note is not None
    assert f"the torn last line was cut off ({len(torn)} bytes)" in note
    assert ledger.path.read_bytes().startswith(whole + b'{"id"')
    assert len(list(Ledger(ledger.path).new_records())) == 2


def test_processes_that_append_at_once_lose_no_line(
    tmp_path: Path, start_forked: Callable[..., list[int]]
) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")

    def append_many(number: int) -> None:
        for place in range(50):
            ledger.append(record(f"{number}-{place}", reason="x" * 3000))

    assert start_forked(append_many, range(4)) == [0] * 4
    names = [each.name for each in ledger.new_records()]
    assert sorted(names) == sorted(f"{n}-{place}" for n in range(4) for place in range(50))


@pytest.fixture
def start_forked() -> Callable[..., list[int]]:
    """Calls a function with each argument in a copy of this process; gives their exit codes."""

    def start(function: Callable[[int], None], arguments: range) -> list[int]:
        children = []
        for argument in arguments:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    function(argument)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return start


def test_a_file_of_something_else_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"note": 1}\n')
    with pytest.raises(UsageError, match="holds a line that is none of a ledger"):
        list(Ledger(path).new_records())


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path) -> None:
    import resource
    import signal

    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.append_night(Night("n1", "plan", {}))
    ledger.append(record())
    before = ledger.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
        with pytest.raises(ArtifactError, match="cannot write"):
            ledger.append(record("next/b/s/i"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ledger.path.read_bytes() == before
