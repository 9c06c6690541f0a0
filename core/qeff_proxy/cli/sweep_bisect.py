"""``qeff-proxy sweep bisect``: which package made a cell turn, and at which layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.output import print_json, print_text, stage_display
from qeff_proxy.common.messages import counted, printable
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from qeff_proxy.sweep.bisect import Turn


def run_bisect(args: argparse.Namespace, words: list[str]) -> int:
    """Look for turns in ledgers, or run a cell in environments."""
    from qeff_proxy.sweep.bisect import (
        Environment,
        bisect_environments,
        bisect_ledgers,
        environments_between,
    )

    if args.python is None and args.locks is None:
        if len(words) not in (1, 2) or words[0].endswith(".toml"):
            raise UsageError(
                "sweep bisect takes a ledger or two",
                "With a plan and a cell, give --python or --locks.",
            )
        turns = bisect_ledgers([Path(word) for word in words], args.only or ["*"])
    else:
        if len(words) != 2 or (args.python and args.locks):
            raise UsageError("sweep bisect takes a plan and a cell, and --python or --locks")
        plan, cell = words
        if args.locks:
            environments = environments_between(*args.locks)
        else:
            environments = [Environment(python, python) for python in args.python]
        if len(environments) < 2:
            raise UsageError("--python names one environment", "Name a good and a bad one.")
        with stage_display("bisect", quiet=args.json) as progress:
            turns = [bisect_environments(Path(plan), cell, environments, progress)]
    if args.json:
        print_json({"turns": [_plain(turn) for turn in turns]})
    else:
        for turn in turns:
            for line in _lines(turn):
                print_text(line)
        if not turns:
            print_text("no cell turned: each passes, or has never passed")
    return 1 if turns else 0


def _plain(turn: Turn) -> dict[str, object]:
    before, after = turn.change.before, turn.change.after
    return {
        "name": turn.change.name,
        "at": turn.change.at,
        "what": turn.change.what,
        "versions": turn.versions,
        "nights": [record and record.night for record in (before, after)],
        "runs": turn.runs,
    }


def _lines(turn: Turn) -> list[str]:
    change = turn.change
    nights = [record.night for record in (change.before, change.after) if record is not None]
    versions = [f"{name} {old} → {new}" for name, (old, new) in turn.versions.items()]
    found = (
        f"between {' and '.join(nights)}" if not turn.runs else f"in {counted(turn.runs, 'run')}"
    )
    lines = [
        f"{printable(change.name)} turned{f' at {change.at}' if change.at else ''}, {found}",
        f"  {printable(change.what)}",
        f"  by {printable(' or '.join(versions) or 'nothing that its versions say')}",
    ]
    if len(versions) > 1:
        lines.append("  one of them: sweep bisect PLAN CELL --locks OLD NEW, or --python")
    return lines
