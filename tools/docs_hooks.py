"""A hook of mkdocs that generates the command reference from the program."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

os.environ["COLUMNS"] = "88"  # argparse wraps by it

from qeff_proxy.cli import COMMANDS, build_parser
from qeff_proxy.errors import ProxyError


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``<!-- commands -->`` in a page by the command reference."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", command_pages())
    return markdown


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's subcommands, by name."""
    for action in parser._actions:  # noqa: SLF001 (argparse tells it in no other way)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


def help_of(parser: argparse.ArgumentParser) -> str:
    """A parser's help as a text block."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", parser.format_help())
    return f"```text\n{text.strip()}\n```\n"


def command_pages() -> str:
    """The ``--help`` of the program and of every command, and the exit codes."""
    lines = [help_of(build_parser(None))]
    for name in COMMANDS:
        parser = subparsers(build_parser(name))[name]
        lines += [f"## qeff-proxy {name}\n", help_of(parser)]
        for action, sub in subparsers(parser).items():
            lines += [f"### qeff-proxy {name} {action}\n", help_of(sub)]
    lines += [
        "## Exit codes\n",
        "| code | error | what it means |\n| --- | --- | --- |",
        "| 0 | | done; of `compare` and `verify`: everything passed |",
        "| 1 | | a comparison failed |",
    ]
    kinds = sorted(ProxyError.__subclasses__(), key=lambda kind: kind.exit_code)
    for kind in kinds:
        if kind.exit_code > 1 and kind.__module__ == "qeff_proxy.errors":
            meaning = (kind.__doc__ or "").splitlines()[0]
            lines.append(f"| {kind.exit_code} | `{kind.__name__}` | {meaning} |")
    lines.append("| 70 | | a defect of qeff-proxy or of a plugin |")
    lines.append("| 130 | | interrupted |")
    return "\n".join(lines) + "\n"
