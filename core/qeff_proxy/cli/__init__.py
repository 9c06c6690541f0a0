"""The ``qeff-proxy`` command.

One module of this package per command. A command module has two functions: ``configure(parser)``
declares its arguments and ``run(args)`` returns the exit code. Only the chosen command's module is
imported, and it imports torch, transformers and the like inside ``run``, so that help is instant.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol, cast

from qeff_proxy.cli.output import plain_warnings, print_json_error, report_error
from qeff_proxy.common.gc_threshold import collecting_rarely
from qeff_proxy.errors import ArtifactError, ProxyError, UsageError

__all__ = ["COMMANDS", "build_parser", "main"]

# command -> one line of help. The module is qeff_proxy.cli.<command>, dashes as underscores.
COMMANDS = {
    "demo": "run the whole flow on checkpoints that come with the program and its plugins",
    "inspect": "show what would be cut: sites, tied weights, bytes in body and vocabulary",
    "export": "cut a model and export its parts to ONNX",
    "compile": "prepare the exported parts for a backend",
    "generate": "run the proxy on text, sound or images, and dump every tensor with --write-io",
    "verify": "run a model on several backends and name the first layer that differs from PyTorch",
    "isolate": "find the operator that makes a backend's numbers wrong, and write it to a file",
    "score": "compare backends with PyTorch on a text: perplexity, divergence, worst tokens",
    "sensitivity": "measure what each layer and kind of module loses in a lower precision",
    "recipe": "find the modules that have to stay wide, prove it, and write them to a file",
    "sweep": "verify many models on many backends, keep every result, and say what changed",
    "compare": "compare two dumps and name the first layer that differs",
    "pack": "pack a dump's inputs for a device's own tools, with their lists and commands",
    "unpack": "make a dump of what a device's tools wrote",
    "run-on": "pack a dump, run it on a device by a command, and compare",
    "backends": "list backends, what they need and how to install it, their devices and options",
    "plugin": "write a package for a plugin of your own, which passes its conformance suite",
    "cache": "list what lies below QEFF_HOME by size and age, and remove what is not used",
    "doctor": "show versions, backends, the cache, memory and disk, and what is wrong with any",
    "shell-completion": "print a script that completes commands and options in your shell",
    "plugins": "list plugins, the model types they serve and what is wrong with any",
}


class _Command(Protocol):
    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See {self.prog} --help.")


def _load_command(name: str) -> _Command:
    return cast("_Command", importlib.import_module(f"qeff_proxy.cli.{name.replace('-', '_')}"))


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of the program, with the arguments of the command ``chosen`` only."""
    parser = _Parser(
        prog="qeff-proxy",
        description="Cut the token embedding and LM head out of a transformer, export its body, "
        "run it anywhere, and dump and compare every tensor.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == chosen:
            _load_command(name).configure(sub)
    return parser


#: Why standard output cannot be written: full, at a quota or limit, or opened for reading.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (0 is success; see `qeff_proxy.errors`)."""
    if sys.stdout is None:  # closed; the next file to be opened would get what libraries print
        report_error("standard output is closed; redirect it to a file or to /dev/null")
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # one that may not have every character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        if not _is_of_output(error):
            raise
        _discard_output()
        report_error(f"cannot write to standard output: {error.strerror}")
        return 1


def _run(arguments: Sequence[str]) -> int:
    """Run a command and report its errors.

    Raises:
        OSError: Standard output is full, or its reader has closed the pipe.
    """
    chosen = next((word for word in arguments if word in COMMANDS), None)
    parser = build_parser(chosen)

    def failed(error: BaseException, message: str, exit_code: int) -> int:
        report_error(message)
        if "--json" in arguments:
            hint = getattr(error, "hint", None)
            problem = getattr(error, "problem", message)
            print_json_error(type(error).__name__, problem, hint, exit_code)
        return exit_code

    try:
        args = parser.parse_args(arguments)
    except UsageError as error:
        return failed(error, str(error), error.exit_code)
    if args.version:
        from qeff_proxy.common.version import installed_version

        sys.stdout.write(f"qeff-proxy {installed_version()}\n")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        _check_names([*arguments, os.environ.get("QEFF_HOME", "")])
        with plain_warnings(), collecting_rarely(), _log_shown(shown=args.debug):
            return _load_command(args.command).run(args)
    except ProxyError as error:
        if args.debug:
            raise
        return failed(error, str(error), error.exit_code)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns it into an exit
            raise error.__context__ from None
        if args.debug:
            raise
        said = "a plugin or library ended the program; run with --debug for the trace"
        return failed(error, said, 70)
    except Exception as error:
        if args.debug or isinstance(error, BrokenPipeError) or _is_of_output(error):
            raise
        if errno.ELOOP in (getattr(each, "errno", None) for each in (error, error.__context__)):
            said = f"{error}. Correct the link, or name another folder (or QEFF_HOME)."
            return failed(error, said, ArtifactError.exit_code)
        said = f"unexpected {type(error).__name__}: {error}. This is a defect of qeff-proxy or of a"
        return failed(error, f"{said} plugin; run with --debug for the trace.", 70)
    except KeyboardInterrupt as error:
        if args.debug:
            raise
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        return failed(error, f"interrupted{where}; no result is half-written", 130)


@contextmanager
def _log_shown(*, shown: bool) -> Iterator[None]:
    """Print the program's own log to standard error: tracebacks of failures that a result keeps."""
    if not shown:
        yield
        return
    import logging

    logger, handler = logging.getLogger("qeff_proxy"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _is_of_output(error: Exception) -> bool:
    """Whether standard output could not be written. An error of a file that was opened names it."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _UNWRITABLE


def _check_names(names: Sequence[str]) -> None:
    """Refuse bytes that are not UTF-8: JSON, ONNX and the tokenizers have no such names."""
    for name in names:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise UsageError(f"{name!r} is not UTF-8", "Rename the file or folder.")


def _discard_output() -> None:
    """Drop what standard output still holds, so that Python's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
