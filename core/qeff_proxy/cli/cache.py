"""``qeff-proxy cache``: what lies below ``QEFF_HOME``, and what of it may go."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from pathlib import Path

from qeff_proxy.artifact.cached_files import KINDS, Entry, choose, list_cache, remove
from qeff_proxy.artifact.export_folder import cache_home
from qeff_proxy.cli.output import add_json_option, format_bytes, print_json, print_text
from qeff_proxy.common.messages import counted, printable
from qeff_proxy.errors import UsageError

_EPILOG = """\
An export has what was compiled of it, dumps of its runs and journals of interrupted verifications
by layer; they go with it. Without --prune, what the options choose is listed, and nothing is
removed. What a run uses stays: what is locked, open on this machine, or was used within the last
hour.
Exit status: 0.
"""
_AGES = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    parser.add_argument("--prune", action="store_true", help="remove what the options choose")
    parser.add_argument(
        "--older-than", metavar="AGE", help="choose what was not used for so long: 30d, 12h or 90m"
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="choose what is longest unused, until the rest has no more than so much: 50GB",
    )
    parser.add_argument(
        "--sweep", type=Path, metavar="LEDGER", help="choose the exports that a ledger's cells used"
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        help="choose only entries of this kind; may be given again",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """List the cache, or remove what was chosen."""
    wanted = (args.older_than, args.max_size, args.sweep, args.kind)
    if args.prune and not any(wanted):
        raise UsageError(
            "--prune needs to know what to remove",
            "Add --older-than, --max-size, --sweep or --kind.",
        )
    age = None if args.older_than is None else _number(args.older_than, _AGES, "--older-than 30d")
    most = None if args.max_size is None else _number(args.max_size, _SIZES, "--max-size 50GB")
    exports = None if args.sweep is None else _exports_of(args.sweep)
    entries = list_cache()
    shown = entries
    if any(wanted):
        since = None if age is None else time.time() - age
        kinds = args.kind or KINDS
        shown = choose(entries, kinds=kinds, unused_since=since, most=most, exports=exports)
    kept = [entry for entry in shown if args.prune and not remove(entry)]
    chosen = {entry.path for entry in shown}
    shown = [one for one in entries if not chosen.isdisjoint([one.path, *one.path.parents])]
    removed = [entry for entry in shown if args.prune and not entry.path.exists()]
    size = sum(entry.size for entry in entries)
    if args.json:
        print_json(
            {
                "home": str(cache_home()),
                "size": size,
                "entries": [{**vars(entry), "path": str(entry.path)} for entry in shown],
                "removed": [str(entry.path) for entry in removed],
            }
        )
        return 0
    _print_table(shown)
    total = f"{counted(len(entries), 'entry', 'entries')}, {format_bytes(size)} in {cache_home()}"
    used = sum(entry.in_use for entry in entries)
    total += f"; {used} in use, now or within the hour" if used else ""
    if args.prune:
        print_text(f"{counted(len(removed), 'entry', 'entries')} removed, of {total}")
        for entry in kept:
            print_text(f"left: {printable(str(entry.path))} is in use by now")
    else:
        prefix = f"{counted(len(shown), 'entry', 'entries')} chosen, of " if any(wanted) else ""
        print_text(prefix + total)
    return 0


def _exports_of(ledger: Path) -> set[str]:
    from qeff_proxy.sweep.ledger import Ledger

    if not ledger.is_file():
        raise UsageError(f"there is no ledger {ledger}", "A sweep writes it.")
    return {record.export for record in Ledger(ledger).new_records() if record.export}


def _number(text: str, units: Mapping[str, float], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in units:
        known = ", ".join(filter(None, units))
        raise UsageError(
            f"{text!r} is not a number with a unit", f"Such as {example}; units: {known}."
        )
    return float(match[1]) * units[match[2]]


def _print_table(entries: list[Entry]) -> None:
    from rich.table import Table

    if not entries:
        return
    home = cache_home().resolve()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what", overflow="fold")
    table.add_column("kind")
    table.add_column("size", justify="right")
    table.add_column("last used", justify="right")
    table.add_column("")
    for entry in entries:
        name = printable(entry.path.relative_to(home).as_posix())
        age = _age(time.time() - entry.last_use)
        table.add_row(
            name, entry.kind, format_bytes(entry.size), age, "in use" if entry.in_use else ""
        )
    print_text(table)


def _age(seconds: float) -> str:
    unit = next((u for u in ("d", "h") if seconds >= _AGES[u]), "m")
    return f"{int(max(seconds, 0) // _AGES[unit])} {unit} ago"
