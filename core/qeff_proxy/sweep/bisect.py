"""Which version of which package made a cell turn, and at which layer.

`bisect_ledgers` reads it from the results that there are. `bisect_environments` runs the cell in
environments between one in which it passes and one in which it does not: half of them are left
after each run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qeff_proxy.dump.selection import matches_any
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep.compare_nights import Change, describe_turn, with_layers
from qeff_proxy.sweep.ledger import FINISHED, Ledger, Record

_PIN = re.compile(r"([\w.-]+)\s*==\s*([^\s;#\\]+)")
_PACKAGES = (
    "import importlib.metadata as m, json\n"
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


@dataclass(frozen=True)
class Turn:
    """Where a cell turned.

    Attributes:
        change: From the last result that passed to the first after it that did not.
        versions: Of the packages that may have caused it: name → (before, after).
        runs: How many environments it ran in.
    """

    change: Change
    versions: dict[str, tuple[str | None, str | None]]
    runs: int = 0


@dataclass(frozen=True)
class Environment:
    """Where a cell can run.

    Attributes:
        title: For messages.
        python: The interpreter.
        packages: Of packages in place of the interpreter's: name → version.
    """

    title: str
    python: str = sys.executable
    packages: dict[str, str] = field(default_factory=dict)


def bisect_ledgers(paths: Sequence[Path], only: Sequence[str] = ("*",)) -> list[Turn]:
    """The turns of all cells whose latest result did not pass, and of which an earlier one did.

    A version with which the cell has passed, too, is not what made it turn.

    Args:
        paths: Of ledgers, the earlier first.
        only: Globs of the cells.

    Raises:
        UsageError: There is no such ledger.
    """
    history: dict[str, list[Record]] = {}
    latest: dict[str, str] = {}  # the identity of each cell in its last night
    for path in paths:
        if not path.is_file():
            raise UsageError(f"there is no ledger {path}", "A sweep writes it.")
        for record in Ledger(path).new_records():
            wanted = matches_any(record.name, only)
            if wanted and record.verdict in FINISHED:
                history.setdefault(record.name, []).append(record)
        for night in Ledger(path).new_nights():
            latest.update(night.cells)
    turns = []
    for name, records in history.items():
        now = [record for record in records if record.id == latest.get(name, record.id)]
        if now and now[-1].verdict == "passed":
            continue  # settings or versions are again those with which it passed
        good = [place for place, record in enumerate(records) if record.verdict == "passed"]
        if good and good[-1] + 1 < len(records):
            before, after = records[good[-1]], records[good[-1] + 1]
            passed = {item for place in good for item in records[place].versions.items()}
            changed = _differing(before.versions, after.versions)
            suspects = {n: both for n, both in changed.items() if (n, both[1]) not in passed}
            turns.append(_turn_of(before, after, suspects or changed, paths))
    return turns


def bisect_environments(
    plan: Path,
    cell: str,
    environments: Sequence[Environment],
    progress: Callable[[str], None] = lambda _line: None,
) -> Turn:
    """Find the first of some environments, from good to bad, in which a cell does not pass.

    Results are kept in ``bisect.jsonl`` beside the plan. What may cause the turn need not be in the
    identity of a cell, so each run is a new one.

    Args:
        plan: The file of the plan.
        cell: The name of the cell.
        environments: The first is known to be good, the last to be bad; both are run, too.
        progress: Called with a line about each run.

    Raises:
        UsageError: The cell passes in the last, or does not in the first, or cannot run in one.
    """
    runs = 0

    def record_in(place: int) -> Record:
        nonlocal runs
        runs += 1
        progress(f"running {cell} with {environments[place].title}")
        return _run(plan, cell, environments[place])

    low, high = 0, len(environments) - 1
    good = record_in(low)
    if good.verdict != "passed":
        raise UsageError(
            f"{cell} does not pass with {environments[low].title}: {good.verdict}, {good.reason}",
            "Name an environment in which it does first.",
        )
    bad = record_in(high)
    if bad.verdict == "passed":
        raise UsageError(
            f"{cell} passes with {environments[high].title}", "Name one in which it does not last."
        )
    while high - low > 1:
        middle = (low + high) // 2
        record = record_in(middle)
        if record.verdict == "passed":
            low, good = middle, record
        else:
            high, bad = middle, record
    first, second = environments[low], environments[high]
    changed = _differing(first.packages, second.packages)
    if first.python != second.python:
        changed = _differing(_installed(first.python), _installed(second.python))
    changed = changed or _differing(good.versions, bad.versions)
    return _turn_of(good, bad, changed, [_ledger_of(plan)], runs)


def environments_between(old: Path, new: Path) -> list[Environment]:
    """One package after the other at its version of the new lock file, the others at the old's.

    Args:
        old: A lock file, such as ``pip freeze`` prints: lines of ``name==version``.
        new: Another.

    Raises:
        UsageError: A file cannot be read, or they pin the same.
    """
    first, second = (_pins_of(path) for path in (old, new))
    changed = [name for name in second if second[name] != first.get(name)]
    if not changed:
        raise UsageError(f"{new} pins what {old} pins", "Name two lock files that differ.")
    packages = {name: first[name] for name in changed if name in first}
    environments = [Environment(f"the packages of {old}", packages=packages)]
    for name in changed:
        packages = {**packages, name: second[name]}
        title = f"{name} {second[name]} and those before it in {new}"
        environments.append(Environment(title, packages=packages))
    return environments


def _pins_of(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the lock file {path} cannot be read: {error}") from error
    found = (_PIN.match(line) for line in text.splitlines())
    pins = {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in found if pin}
    if not pins:
        raise UsageError(f"{path} has no line NAME==VERSION", "pip freeze prints such a file.")
    return pins


def _run(plan: Path, cell: str, environment: Environment) -> Record:
    """The record of a cell in an environment."""
    folders = [str(_installed_alone(plan, *pin)) for pin in environment.packages.items()]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [environment.python, "-m", "qeff_proxy", "sweep", str(plan), "--only", cell, "--json"]
    more = ["--again", cell, "--ledger", str(_ledger_of(plan))]
    ended = _run_command([*words, *more], path)
    try:
        value = json.loads(ended.stdout)["cells"][cell]
        return msgspec.convert(value, Record)
    except (ValueError, KeyError, TypeError) as error:  # it has no result, but an error
        said = next(iter(ended.stderr.strip().splitlines()[-1:]), f"exit code {ended.returncode}")
        raise UsageError(f"{cell} cannot run with {environment.title}: {said}") from error


def _run_command(words: Sequence[str], path: str | None = None) -> subprocess.CompletedProcess[str]:
    more = {} if path is None else {"PYTHONPATH": path}
    try:
        return subprocess.run(  # noqa: S603 (the user names it)
            words, env={**os.environ, **more}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(f"{words[0]} cannot be run: {error.strerror}") from error


def _installed_alone(plan: Path, name: str, version: str) -> Path:
    """A folder with one package, which goes before others on the path; made once."""
    folder = _ledger_of(plan).with_suffix("") / "packages" / f"{name}-{version}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        command = [sys.executable, "-m", "pip", *words, "--target", str(partial)]
        ended = _run_command([*command, f"{name}=={version}"])
        if ended.returncode:
            said = next(iter(ended.stderr.strip().splitlines()[-1:]), "")
            raise UsageError(f"pip cannot install {name} {version}: {said}")
        partial.rename(folder)
    return folder


def _ledger_of(plan: Path) -> Path:
    return plan.resolve().parent / "bisect.jsonl"


def _installed(python: str) -> dict[str, str]:
    """The packages of an interpreter."""
    ended = _run_command([python, "-c", _PACKAGES])
    packages: dict[str, str] = json.loads(ended.stdout)
    return packages


def _differing(
    before: dict[str, str], after: dict[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    names = sorted({*before, *after})
    both = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _turn_of(
    before: Record,
    after: Record,
    versions: dict[str, tuple[str | None, str | None]],
    ledgers: Sequence[Path],
    runs: int = 0,
) -> Turn:
    (change,) = with_layers([describe_turn(before, after, "")], *map(Ledger, ledgers))
    return Turn(change, versions, runs)
