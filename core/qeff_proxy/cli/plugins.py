"""``qeff-proxy plugins``: list the installed plugins, their model types and their errors."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict

from qeff_proxy.cli.output import add_json_option, print_json, print_text
from qeff_proxy.errors import PluginError
from qeff_proxy.plugins.entry_points import ENVIRONMENT_VARIABLE
from qeff_proxy.plugins.manager import PluginReport, Plugins

_COLOURS = {"ok": "green", "failed": "red", "rival": "red", "disabled": "dim", "listed": ""}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="import every plugin and check its hooks; exit with 10 when one cannot be used",
    )
    add_json_option(parser)
    parser.epilog = (
        f"{ENVIRONMENT_VARIABLE} chooses: a list, separated by commas, of PACKAGE (use only "
        "these), -PACKAGE (not this one) or MODEL_TYPE=PACKAGE (this one for that model type). "
        "'generic' is the fallback that serves every model type no plugin claims."
    )


def run(args: argparse.Namespace) -> int:
    """List the plugins; returns 10 when ``--check`` found one that cannot be used."""
    plugins = Plugins.discover()
    if args.check:
        # A plugin may print while it is imported, which must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            reports, generic = plugins.check(), plugins.check_generic()
    else:
        reports, generic = plugins.reports(), plugins.generic_report()
    if args.json:
        print_json(
            {
                "checked": args.check,
                "plugins": [asdict(report) for report in reports],
                "generic": asdict(generic),
            }
        )
    else:
        _print_table(reports, generic, checked=args.check)
    unusable = [r for r in (*reports, generic) if r.state in {"failed", "rival"}]
    return PluginError.exit_code if args.check and unusable else 0


def _print_table(reports: Sequence[PluginReport], generic: PluginReport, *, checked: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plugin", no_wrap=True)  # folded, it would lose its indent
    table.add_column("state", no_wrap=True)
    table.add_column("model types", overflow="fold")
    packages: list[str] = []
    for report in (*reports, generic):
        package = " ".join(filter(None, [report.distribution or "(no package)", report.version]))
        if package not in packages[-1:]:
            packages.append(package)
            table.add_row(Text(package, "bold"), "", "")
        served = ", ".join(report.model_types) or ("every other" if report is generic else "")
        state = Text(report.state, _COLOURS[report.state])
        table.add_row(f"  {report.plugin}", state, served)
        if report.hooks:
            table.add_row("", "", Text(f"hooks: {', '.join(report.hooks)}", "dim"))
    print_text(table)
    for report in (*reports, generic):
        if report.reason:
            name = " ".join(filter(None, [report.distribution, report.plugin])) or "unknown package"
            print_text(f"{name}: {report.reason}")
    if not checked:
        print_text("Nothing was imported; --check imports each plugin and checks its hooks.")
