"""The ``qeff-proxy`` command.

One module of this package per command. A command module has two functions: ``configure(parser)``
declares its arguments and ``run(args)`` returns the exit code. Only the chosen command's module is
imported, and it imports torch, transformers and the like inside ``run``, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from qeff_proxy.cli.output import plain_warnings, report_error
from qeff_proxy.common.gc_threshold import collecting_rarely
from qeff_proxy.errors import ProxyError

__all__ = ["COMMANDS", "build_parser", "main"]

# command -> one line of help. The module is qeff_proxy.cli.<command>.
COMMANDS = {
    "demo": "run the whole flow on checkpoints that come with the program and its plugins",
    "inspect": "show what would be cut: sites, tied weights, bytes in body and vocabulary",
    "export": "cut a model and export its parts to ONNX",
    "compile": "prepare the exported parts for a backend",
    "generate": "run the proxy on text, sound or images, and dump every tensor with --write-io",
    "verify": "run a model on several backends and name the first layer that differs from PyTorch",
    "compare": "compare two dumps and name the first layer that differs",
    "convert": "convert a dump to or from other tools' formats",
    "backends": "list backends, what they need and how to install it, their devices and options",
    "plugin": "write a package for a plugin of your own, which passes its conformance suite",
    "plugins": "list plugins, the model types they serve and what is wrong with any",
}


class _Command(Protocol):
    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        report_error(f"{message}. See {self.prog} --help.")
        self.exit(2)


def _load_command(name: str) -> _Command:
    return cast("_Command", importlib.import_module(f"qeff_proxy.cli.{name}"))


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (0 is success; see `qeff_proxy.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if word in COMMANDS), None)
    parser = build_parser(chosen)
    args = parser.parse_args(arguments)
    if args.version:
        from qeff_proxy.common.version import installed_version

        sys.stdout.write(f"qeff-proxy {installed_version()}\n")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        with plain_warnings(), collecting_rarely():
            return _load_command(args.command).run(args)
    except ProxyError as error:
        if args.debug:
            raise
        report_error(str(error))
        return error.exit_code
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns it into an exit
            return _broken_pipe()
        if args.debug:
            raise
        report_error("a plugin or library ended the program; run with --debug for the trace")
        return 70
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:
        if args.debug:
            raise
        report_error(
            f"unexpected {type(error).__name__}: {error}. This is a defect of qeff-proxy or of a "
            "plugin; run with --debug for the trace."
        )
        return 70
    except KeyboardInterrupt:
        if args.debug:
            raise
        report_error("interrupted; nothing half-written was kept")
        return 130


def _broken_pipe() -> int:
    """The reader of our output has closed the pipe; a later flush must not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
