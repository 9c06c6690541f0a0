"""``qeff-proxy compare``: compare two dumps."""

from __future__ import annotations

import argparse
from pathlib import Path

from qeff_proxy.cli.output import add_json_option, print_json, print_text

_EPILOG = """\
Exit status: 0 when something was compared and all of it passed, 1 when the dumps differ, 9 when a
dump is damaged or incomplete or the two have no tensor in common.

Limits of --tol: atol and rtol (every element, as numpy.allclose), peak (the largest error over the
reference's largest magnitude), sqnr (dB, at least), cosine (at least), rounding (elements beyond
atol and rtol pass where the largest error over the reference's largest magnitude is at most R, and
the sqnr at least -20*log10(R)). The last glob that matches replaces the tolerance of the dtype:
--tol '*=peak:0.02' --tol '*.logits=cosine:0.999'.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``compare``."""
    parser.epilog = _EPILOG
    parser.add_argument("reference", metavar="REFERENCE", help="folder of the reference's dump")
    parser.add_argument("candidate", metavar="CANDIDATE", help="folder of the candidate's dump")
    add_compare_options(parser)
    add_json_option(parser)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """What `compare_and_print` reads."""
    parser.add_argument(
        "--tol",
        action="append",
        default=[],
        metavar="GLOB=LIMIT:VALUE,…",
        help="tolerance of the tensors that match, such as 'body.out.present_*=atol:1e-3,rtol:1e-2'"
        " (repeatable)",
    )
    parser.add_argument(
        "--tensors",
        action="append",
        metavar="GLOB",
        help="compare only the tensors that match (repeatable)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="compare only what both dumps have, and ignore the rest",
    )
    parser.add_argument("--all", action="store_true", help="list every tensor, not only the worst")
    parser.add_argument("--html", metavar="FILE", help="also write a report, one page, offline")


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return 0 when all passed, else 1."""
    return compare_and_print(args, args.reference, args.candidate)


def compare_and_print(
    args: argparse.Namespace, reference: str | Path, candidate: str | Path
) -> int:
    """Compare two dumps as the arguments say."""
    from qeff_proxy.compare import Tolerances, compare_dumps, write_report
    from qeff_proxy.compare.report_file import check_report_place
    from qeff_proxy.compare.tables import render_comparison

    if args.html:
        check_report_place(args.html)
    comparison = compare_dumps(
        reference,
        candidate,
        tolerances=Tolerances.parse(args.tol),
        tensors=tuple(args.tensors or ("*",)),
        partial=args.partial,
    )
    if args.html:
        write_report(comparison, args.html)
    if args.json:
        print_json(comparison.to_json())
    else:
        for renderable in render_comparison(comparison, rows=0 if args.all else 12):
            print_text(renderable)
        if args.html:
            print_text(f"Report: {args.html}")
    return 0 if comparison.passed else 1
