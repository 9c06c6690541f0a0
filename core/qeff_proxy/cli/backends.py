"""``qeff-proxy backends``: list the backends, their state, and how to install the others."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qeff_proxy.cli.output import add_json_option, print_json, print_text
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.backends.registry import BackendReport

_COLOURS = {"ok": "green", "failed": "red", "rival": "red", "missing": "dim", "listed": ""}
_WORDS = {"listed": "installed", "missing": "not installed"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help="show the devices and options of these backends"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="import every backend that is installed; exit with 8 when one cannot be used",
    )
    add_json_option(parser)
    parser.epilog = (
        "Options are given as -O NAME=VALUE to compile and generate, and as -O BACKEND.NAME=VALUE "
        "to verify."
    )


def run(args: argparse.Namespace) -> int:
    """List the backends; returns 8 when one that was imported cannot be used."""
    from qeff_proxy.backends.registry import check_backends, list_backends

    checked = bool(args.check or args.name)
    # What a package prints while it is imported must not spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        reports = check_backends(args.name) if checked else list_backends()
    if args.json:
        print_json({"checked": checked, "backends": [asdict(report) for report in reports]})
    else:
        _print_table(reports)
        for report in reports:
            _print_details(report, with_options=bool(args.name))
        if not checked:
            print_text("No backend was imported; --check imports each, NAME shows its options.")
    unusable = any(report.state in {"failed", "rival"} for report in reports)
    unusable |= bool(args.name) and any(report.state == "missing" for report in reports)
    return BackendError.exit_code if checked and unusable else 0


def _print_table(reports: Sequence[BackendReport]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("backend", "state", "version"):
        table.add_column(heading, no_wrap=True)
    table.add_column("for", overflow="fold")
    for report in reports:
        word = _WORDS.get(report.state, report.state)
        summary = report.summary or f"package {report.package or 'unknown'}"
        table.add_row(
            report.name,
            Text(word, _COLOURS[report.state]),
            report.version or "",
            summary,
        )
    print_text(table)


def _print_details(report: BackendReport, *, with_options: bool) -> None:
    name = report.name or report.package or "unknown package"
    lines = []
    if report.reason:
        lines.append("; ".join(filter(None, [f"{name}: {report.reason}", report.install])))
    if report.devices:
        lines.append(f"{name} finds {', '.join(report.devices)}")
    for line in lines:
        print_text(line)
    if with_options and report.options is not None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for option, meaning in report.options.items():
            table.add_row(f"  {option}", meaning)
        print_text(f"{name} has {'the options' if report.options else 'no options'}")
        print_text(table)
