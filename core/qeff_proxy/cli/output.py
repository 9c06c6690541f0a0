"""How commands speak: tables for people on stdout, JSON for machines, one line for an error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from rich.console import Console, RenderableType

__all__ = ["add_json_option", "print_json", "print_text", "report_error", "stdout_console"]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the ``--json`` option that every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text and tables"
    )


def print_json(value: Any) -> None:
    """Print ``value`` as one indented JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def stdout_console() -> Console:
    """A rich console on stdout; plain and 100 columns wide when stdout is not a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def print_text(renderable: RenderableType) -> None:
    """Print a rich renderable (a table, a string) on stdout."""
    stdout_console().print(renderable)


def report_error(message: str) -> None:
    """Print ``message`` as one line on stderr."""
    sys.stderr.write("qeff-proxy: error: " + " ".join(message.split()) + "\n")
