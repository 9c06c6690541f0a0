"""``qeff-proxy sweep PLAN``, and what its ledger says: ``sweep diff``, ``report``, ``bisect``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.output import add_json_option, print_json, print_text, stage_display
from qeff_proxy.common.messages import counted, printable
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.sweep.compare_nights import NightComparison
    from qeff_proxy.sweep.ledger import Record
    from qeff_proxy.sweep.plan import Plan
    from qeff_proxy.sweep.run_sweep import Sweep

#: Cells that cannot run here, of which a dry run tells why.
_MISSING = 10
_EPILOG = """\
PLAN is a TOML file of models, backends, settings and inputs (docs/sweeps.md). Each cell is one
verification in a process of its own; what it gives is appended to the ledger, and a cell that the
ledger has is not run again, so that an interrupted sweep goes on where it was.
diff compares two nights (runs of a sweep; by default the last two); report writes them as a page.
bisect names the package and the layer at which cells turned that do not pass any more: from one
ledger or two, or by runs of one cell between two environments (--python) or lock files (--locks).
Exit status: 0 when every cell passed (of diff: when nothing got worse; of bisect: when no cell
turned), else 1; 130 on Ctrl-C.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "words",
        nargs="+",
        metavar="WHAT",
        help="PLAN, diff LEDGER [A B], report LEDGER [A B], bisect LEDGER [LEDGER], or bisect PLAN "
        "CELL: what to run, or whose results to compare",
    )
    runs = parser.add_argument_group("running a plan")
    runs.add_argument("--dry-run", action="store_true", help="print the cells, and run nothing")
    runs.add_argument(
        "--on",
        default="local",
        metavar="EXECUTOR[:ADDRESS]",
        help="where cells run: local (default), ray, slurm, or an executor of an installed package",
    )
    runs.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="cells at a time (local: as many as cores, with 2 GB of free memory each)",
    )
    runs.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="run only the cells that match; may be given again (of bisect: show only these)",
    )
    runs.add_argument("--ledger", type=Path, metavar="FILE", help="in place of the plan's")
    runs.add_argument("--shard", metavar="I/N", help="only the I-th of N parts of the cells")
    runs.add_argument(
        "--night", metavar="NAME", help="a name for this run; shards that share one are one night"
    )
    runs.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="GLOB",
        help="run the cells that match although the ledger has them; may be given again",
    )
    runs.add_argument(
        "--no-wait", action="store_true", help="leave out cells that another sweep is running"
    )
    told = parser.add_argument_group("comparing nights")
    told.add_argument("--html", type=Path, metavar="FILE", help="write a page (report)")
    told.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML (diff)")
    told.add_argument("--markdown", action="store_true", help="print Markdown (diff)")
    found = parser.add_argument_group("bisecting")
    found.add_argument(
        "--python",
        nargs="+",
        metavar="PYTHON",
        help="interpreters of environments, from one in which the cell passes to one that is bad",
    )
    found.add_argument(
        "--locks",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="lock files (pip freeze): their packages are exchanged one after the other",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run a plan, or compare the nights of a ledger."""
    action, *words = args.words
    of_plans: dict[str, Any] = {
        "dry_run": False,
        "workers": None,
        "shard": None,
        "night": None,
        "again": [],
    }
    of_plans |= {"on": "local", "no_wait": False, "ledger": None}
    of_nights = {"html": None, "junit": None, "markdown": False}
    of_bisect = {"python": None, "locks": None}
    if action == "bisect":
        from qeff_proxy.cli.sweep_bisect import run_bisect

        _refuse(args, action, **of_plans, **of_nights)
        return run_bisect(args, words)
    if action not in ("diff", "report"):
        if words:
            raise UsageError(f"{words[0]} is one argument too many", "Name one plan.")
        _refuse(args, "a plan", **of_nights, **of_bisect)
        return _run_plan(args, Path(action))
    _refuse(args, action, **of_plans, **of_bisect, only=[])
    if len(words) not in (1, 3):
        raise UsageError(f"sweep {action} takes a ledger, or a ledger and two nights")
    return _compare(args, action, Path(words[0]), (words[1], words[2]) if words[1:] else None)


def _refuse(args: argparse.Namespace, what: str, **unused: Any) -> None:
    for name, value in unused.items():
        if getattr(args, name) != value:
            raise UsageError(f"--{name.replace('_', '-')} has no use for {what}")


def _run_plan(args: argparse.Namespace, path: Path) -> int:
    from qeff_proxy.sweep.plan import read_plan

    shard = _shard_of(args.shard)
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers {args.workers} runs no cell", "Name 1 or more.")
    plan = read_plan(path, args.ledger)
    if args.dry_run:
        _print_cells(args, plan, shard)
        return 0
    from qeff_proxy.sweep.run_sweep import run_sweep

    with stage_display("sweep", quiet=args.json) as progress:
        sweep = run_sweep(
            plan,
            on=args.on,
            workers=args.workers,
            again=args.again,
            only=args.only,
            shard=shard,
            night=args.night,
            wait_for_others=not args.no_wait,
            progress=progress,
            finished=_say_nothing if args.json or sys.stderr.isatty() else _say,
        )
    if args.json:
        print_json(_plain(sweep))
    else:
        for renderable in _rendered(sweep):
            print_text(renderable)
    return 130 if sweep.interrupted else 0 if sweep.passed else 1


def _shard_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text} is not I/N", "Such as 1/4, 2/4, 3/4 and 4/4.")
    return int(match[1]), int(match[2])


def _print_cells(args: argparse.Namespace, plan: Plan, shard: tuple[int, int] | None) -> None:
    from rich.table import Table

    from qeff_proxy.dump.selection import matches_any
    from qeff_proxy.sweep.identify_cells import identify_cells
    from qeff_proxy.sweep.ledger import Ledger
    from qeff_proxy.sweep.run_sweep import cells_of

    cells = cells_of(plan, shard)
    patterns = args.only or ["*"]
    cells = [cell for cell in cells if matches_any(cell.name, patterns)]
    identities = identify_cells(cells)
    wanted = {identity.id for identity in identities.values()}
    known = {r.id: r for r in Ledger(plan.ledger).new_records() if r.id in wanted}
    rows = [
        {
            "name": cell.name,
            "source": cell.source,
            "id": identities[cell.name].id,
            "verdict": record.verdict if (record := known.get(identities[cell.name].id)) else None,
            "missing": identities[cell.name].missing,
        }
        for cell in cells
    ]
    if args.json:
        print_json({"plan": str(plan.path), "ledger": str(plan.ledger), "cells": rows})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("cell", "source", "in the ledger"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(printable(row[key] or "") for key in ("name", "source", "verdict")))
    print_text(table)
    missing = [row for row in rows if row["missing"]]
    for row in missing[:_MISSING]:
        print_text(printable(f"{row['name']} cannot run on this machine: {row['missing']}"))
    if len(missing) > _MISSING:
        print_text(f"… and {counted(len(missing) - _MISSING, 'other cell')} cannot.")
    print_text(f"{counted(len(rows), 'cell')}; nothing was run. Ledger: {plan.ledger}")


def _say_nothing(_record: Record) -> None:
    pass


def _say(record: Record) -> None:
    """A line a cell, for the log of a CI job."""
    seconds = record.seconds.get("total", 0.0)
    said = f": {record.reason}" if record.reason else ""
    sys.stderr.write(printable(f"{record.name} {record.verdict} in {seconds:.1f} s{said}") + "\n")
    sys.stderr.flush()


def _plain(sweep: Sweep) -> dict[str, Any]:
    import msgspec

    return {
        "passed": sweep.passed,
        "interrupted": sweep.interrupted,
        "night": sweep.night,
        "ledger": str(sweep.ledger),
        "ran": sweep.ran,
        "elsewhere": sweep.elsewhere,
        "notes": sweep.notes,
        "cells": {name: msgspec.to_builtins(each) for name, each in sweep.records.items()},
    }


def _rendered(sweep: Sweep) -> list[RenderableType]:
    """The table of cells, and a line that counts them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("cell", "verdict", "first divergence, or why"):
        table.add_column(heading, overflow="fold")
    for heading in ("of peak", "SQNR dB", "tokens", "seconds"):
        table.add_column(heading, justify="right")
    counts: dict[str, int] = {}
    for name, record in sweep.records.items():
        verdict = record.verdict if record is not None else "not run"
        counts[verdict] = counts.get(verdict, 0) + 1
        styled = Text(verdict, "green" if verdict == "passed" else "red")
        table.add_row(printable(name), styled, *_row(record))
    said = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    kept = len(sweep.records) - len(sweep.ran) - counts.get("not run", 0)
    lines = [f"{counted(len(sweep.records), 'cell')}: {said}; {len(sweep.ran)} ran now"]
    if kept > 0:
        lines[0] += f", {kept} known from before"
    if sweep.interrupted:
        lines.append("Interrupted: the cells that ran were stopped; what was done is kept.")
    if sweep.elsewhere:
        lines.append(f"{counted(len(sweep.elsewhere), 'cell')} left to another sweep.")
    lines += [f"Note: {note}" for note in sweep.notes]
    lines.append(f"ledger: {sweep.ledger} (night {sweep.night})")
    return [table, "", *lines]


def _row(record: Record | None) -> list[str]:
    from qeff_proxy.compare.verdict import format_share

    if record is None:
        return [""] * 5
    why = str(record.divergence) if record.divergence is not None else record.reason
    return [
        printable(why),
        "" if record.error is None else format_share(record.error),
        "" if record.sqnr is None else f"{record.sqnr:.1f}",
        f"{record.equal_tokens}/{record.tokens}" if record.tokens else "",
        f"{record.seconds.get('total', 0.0):.1f}",
    ]


def _compare(
    args: argparse.Namespace, action: str, path: Path, nights: tuple[str, str] | None
) -> int:
    """Compare two nights; write the page of a report."""
    from qeff_proxy.sweep.compare_nights import compare_nights
    from qeff_proxy.sweep.write_page import write_page

    if action == "report" and args.html is None:
        raise UsageError("sweep report writes a page", "Name it with --html FILE.")
    compared = compare_nights(path, nights)
    if args.html is not None:
        write_page(compared, args.html)
    if args.junit is not None:
        from qeff_proxy.common.file_errors import writing
        from qeff_proxy.common.write_whole import write_whole

        with writing(args.junit):
            write_whole(args.junit, _junit(compared))
    if args.json:
        print_json(
            {
                "ledger": str(compared.ledger),
                "before": compared.before,
                "after": compared.after,
                "worse": compared.worse,
                "changes": [
                    {**{key: vars(change)[key] for key in ("name", "kind", "worse", "what", "at")}}
                    for change in compared.changes
                ],
            }
        )
    else:
        for renderable in (_markdown if args.markdown else _change_lines)(compared):
            print_text(renderable)
        if args.html is not None and not args.markdown:
            print_text(f"report: {args.html}")
    return 1 if action == "diff" and compared.worse else 0


def _change_lines(compared: NightComparison) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from qeff_proxy.sweep.write_page import describe_outcome

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "cell", "where", "what changed"):
        table.add_column(heading, overflow="fold")
    for change in compared.changes:
        style = "red" if change.worse else "green" if change.better else ""
        word = Text("worse" if change.worse else change.kind, style)
        table.add_row(word, *(printable(t) for t in (change.name, change.at or "", change.what)))
    lines: list[RenderableType] = [table, ""] if compared.changes else []
    between = f"{compared.before} → {compared.after}" if compared.before else compared.after
    if compared.before is None:
        between += "; there is no earlier one of this plan to compare it with"
    return [*lines, describe_outcome(compared), f"nights: {between}"]


def _markdown(compared: NightComparison) -> list[RenderableType]:
    from qeff_proxy.sweep.write_page import describe_outcome

    lines: list[RenderableType] = [f"**{describe_outcome(compared)}**"]
    if compared.changes:
        lines += ["", "| | cell | where | what changed |", "| --- | --- | --- | --- |"]
    for change in compared.changes:
        texts = ("worse" if change.worse else change.kind, change.name, change.at, change.what)
        escaped = (printable(text or "").replace("|", "\\|").replace("<", "&lt;") for text in texts)
        lines.append(f"| {' | '.join(escaped)} |")
    return lines


def _junit(compared: NightComparison) -> bytes:
    """A test case a cell; one that got worse is a failure."""
    from xml.etree import ElementTree

    worse: dict[str, list[str]] = {}
    for change in compared.changes:
        if change.worse:
            worse.setdefault(change.name, []).append(change.what)
    names = dict.fromkeys([*compared.records, *worse])
    suite = ElementTree.Element(
        "testsuite", name="qeff-proxy sweep", tests=str(len(names)), failures=str(len(worse))
    )
    for name in names:
        model, _, rest = printable(name).partition("/")
        record = compared.records.get(name)
        seconds = record.seconds.get("total", 0.0) if record is not None else 0.0
        case = ElementTree.SubElement(
            suite, "testcase", classname=model, name=rest, time=f"{seconds:.3f}"
        )
        if name in worse:
            text = printable("; ".join(worse[name]))
            ElementTree.SubElement(case, "failure", message=text)
    page: bytes = ElementTree.tostring(suite, "utf-8", xml_declaration=True)
    return page
