"""``qeff-proxy convert``: dumps to and from the formats of other tools."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qeff_proxy.cli.output import add_json_option, print_json, print_text

_GROUP = "qeff_proxy.dump_formats"
#: An option's name → that of the parameter of a format's function.
_PARAMETERS = {"dtype": "dtypes", "like": "like", "model": "model", "runner": "runner"}
_EPILOG = """\
Formats: onnx is test_data_set_N/{input,output}_K.pb, polygraphy is inputs.json and outputs.json;
installed packages add others. Each holds one graph, so one part is converted.

To compare another tool's outputs with a dump, give that dump with --like: the steps then get its
names, and files without dtypes its dtypes.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``convert``."""
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SOURCE", type=Path, help="what to convert")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a new folder")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", metavar="FORMAT", help="SOURCE is a dump; write this format")
    way.add_argument("--from", dest="origin", metavar="FORMAT", help="write a dump of this format")
    parser.add_argument("--part", metavar="PART", help="the part to convert (default: body)")
    parser.add_argument("--like", metavar="DUMP", type=Path, help="a dump of the same run")
    parser.add_argument(
        "--model", metavar="ONNX", type=Path, help="the part's graph, whose order counts (onnx)"
    )
    parser.add_argument("--runner", metavar="NAME", help="whose outputs to read (polygraphy)")
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        metavar="GLOB=DTYPE",
        help="dtype of the graph tensors that match (formats without dtypes, repeatable)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and return 0."""
    from qeff_proxy.dump import read_dump
    from qeff_proxy.dump.convert import BUILTIN_FORMATS, ConversionSource
    from qeff_proxy.errors import PluginError, UsageError
    from qeff_proxy.plugins.entry_points import find_entry, load_entry

    function = "export_dump" if args.to else "import_dump"
    try:
        entry = find_entry(_GROUP, "format", args.to or args.origin, BUILTIN_FORMATS)
    except PluginError as error:
        raise UsageError(error.problem, error.hint) from error
    convert = load_entry(entry, "format", lambda module: getattr(module, function))
    options = _options(args, convert)
    if args.to:
        convert(ConversionSource(read_dump(args.source), args.part), args.target, **options)
        report = {"written": str(args.target), "format": args.to}
    else:
        if args.like is not None:
            options["like"] = ConversionSource(read_dump(args.like), args.part)
        convert(args.source, args.target, part=args.part, **options)
        dump = read_dump(args.target)
        report = {
            "written": str(args.target),
            "format": "dump",
            "steps": len(dump.steps),
            "tensors": len(dump.names()),
        }
    if args.json:
        print_json(report)
    else:
        print_text(f"Wrote {args.target} ({report['format']})")
    return 0


def _options(args: argparse.Namespace, convert: Callable[..., object]) -> dict[str, Any]:
    """The options that were given, as keyword arguments.

    Raises:
        UsageError: The format has no use for one.
    """
    from qeff_proxy.errors import UsageError

    takes = inspect.signature(convert).parameters
    given = {name: getattr(args, name) for name in _PARAMETERS if getattr(args, name)}
    for name in given:
        if _PARAMETERS[name] not in takes:
            usable = [f"--{option}" for option, name in _PARAMETERS.items() if name in takes]
            raise UsageError(
                f"--{'to' if args.to else 'from'} {args.to or args.origin} has no use for --{name}",
                f"It takes {', '.join(usable)}." if usable else "Leave it out.",
            )
    options = {_PARAMETERS[name]: value for name, value in given.items()}
    if "dtypes" in options:
        options["dtypes"] = _dtypes(args.dtype)
    return options


def _dtypes(options: list[str]) -> dict[str, str]:
    from qeff_proxy.dump.format import DTYPES
    from qeff_proxy.errors import UsageError

    pairs = [option.rpartition("=") for option in options]
    for glob, _, dtype in pairs:
        if not glob or dtype not in DTYPES:
            raise UsageError(
                f"{glob}={dtype} is not a dtype of a tensor",
                f"Write GLOB=DTYPE with one of {', '.join(DTYPES)}.",
            )
    return {glob: dtype for glob, _, dtype in pairs}
