"""``qeff-proxy plugin new``: write the package of a new plugin."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from qeff_proxy.cli.output import add_json_option, print_json, print_text

_KINDS = ("text", "embedding", "audio", "vision")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="new", required=True)
    new = actions.add_parser(
        "new",
        help="write a package that passes its own conformance suite",
        description="Write a plugin package: metadata, one family's file, and a test file that "
        "runs the conformance suite on it.",
    )
    new.add_argument("name", metavar="NAME", help="of the package, such as acme-models")
    new.add_argument(
        "--like", choices=_KINDS, default="text", help="the kind of family (default: text)"
    )
    new.add_argument(
        "--model-type",
        metavar="TYPE",
        help="the model_type of the checkpoints to serve (default: one to try it with)",
    )
    new.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write (default: NAME, here)"
    )
    new.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_json_option(new)


def run(args: argparse.Namespace) -> int:
    """Write the package, and print the next steps."""
    from qeff_proxy.testing.new_plugin import write_plugin

    written = write_plugin(args.name, args.like, args.output or Path(args.name), args.model_type)
    if args.json:
        print_json({**asdict(written), "folder": str(written.folder)})
        return 0
    for file in written.files:
        print_text(str(written.folder / file))
    print_text(f"It serves {written.model_type} models. Next, in {written.folder}:")
    print_text("  pip install -e . 'qeff-proxy[testing]'")
    print_text("  qeff-proxy plugins --check")
    print_text("  pytest")
    if written.note is not None:
        print_text(f"Before that: {written.note}")
    return 0
