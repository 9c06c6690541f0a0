"""The output of commands: tables or JSON on stdout, errors in one line on stderr.

Names of files and models come from others: their control characters are escaped here, and nothing
in them is markup.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from qeff_proxy.common.messages import escape_controls

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: The width of a pipe or file: more columns than any line needs.
_UNFOLDED = 100_000
#: Characters of an error or a warning.
_LONGEST = 2_000


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``, which every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text and tables"
    )


def print_json(value: Any) -> None:
    """Print ``value`` as one indented JSON document on stdout."""
    has_all = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not has_all)
    sys.stdout.write(escape_controls(text) + "\n")


def stdout_console() -> Console:
    """A rich console on stdout; in a pipe or file it is so wide that no line is folded.

    Folded names and paths could not be found with tools such as grep. Strings are not markup; for
    a style, print a `rich.text.Text`.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(escape_controls(text), **settings)

    width = None if sys.stdout.isatty() else _UNFOLDED
    return PlainConsole(highlight=False, markup=False, emoji=False, width=width)


def print_text(renderable: RenderableType) -> None:
    """Print a table, or a string, on stdout.

    A string is one line; on a terminal that is narrower it is folded between words, unless it is
    indented, as what is to be copied is.
    """
    if isinstance(renderable, str):
        sys.stdout.write(_folded(escape_controls(renderable)) + "\n")
        return
    from rich.text import Text

    if isinstance(renderable, Text):
        renderable = Text(escape_controls(renderable.plain), renderable.style)
    from rich.table import Table

    from qeff_proxy.cli.fit_table import fit_table

    console = stdout_console()
    if isinstance(renderable, Table):
        console.print(*fit_table(renderable, console), sep="\n")
    else:
        console.print(renderable)


def _folded(text: str) -> str:
    if "\n" in text or text.startswith(" ") or not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    if len(text) <= width:
        return text
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def report_error(message: str) -> None:
    """Print ``message`` as one line on stderr."""
    _report("error", message)


def print_json_error(kind: str, message: str, hint: str | None, exit_code: int) -> None:
    """Print an error as a JSON document on stdout, for those who read a result from there."""
    error = {"type": kind, "message": message, "hint": hint, "exit_code": exit_code}
    print_json({"error": error})


def _report(kind: str, message: str) -> None:
    line = escape_controls(" ".join(message.split()))
    if len(line) > _LONGEST:  # a damaged file's text is in it; the hint at the end stays
        line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    sys.stderr.write(f"qeff-proxy: {kind}: {line}\n")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings as one line on stderr, without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],  # noqa: ARG001 (the signature is that of the warnings module)
        filename: str,  # noqa: ARG001
        lineno: int,  # noqa: ARG001
        file: TextIO | None = None,  # noqa: ARG001
        line: str | None = None,  # noqa: ARG001
    ) -> None:
        _report("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def stage_display(title: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the stage of a long job and its time on stderr; nothing if ``quiet``.

    Yields a function to call with the name of each stage as it starts.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _stage: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape_controls(title))
        yield lambda stage: progress.update(task, description=escape_controls(f"{title}: {stage}"))


def format_bytes(count: int) -> str:
    """``count`` in B, kB, MB or GB (powers of 1000)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
