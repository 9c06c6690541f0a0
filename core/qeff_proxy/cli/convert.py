"""``qeff-proxy convert``: dumps to and from the formats of other tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.output import add_json_option, print_json, print_text

if TYPE_CHECKING:
    from qeff_proxy.dump.convert import ConversionSource

_FORMATS = ("qaic", "onnx", "polygraphy")
#: The conversions that use an option.
_USED_BY = {
    "dtype": ("--from qaic",),
    "like": tuple(f"--from {name}" for name in _FORMATS),
    "model": ("--from onnx", "--to onnx"),
    "runner": ("--from polygraphy",),
}
_EPILOG = """\
Formats: qaic is aic_batch_io.json with .raw files, onnx is test_data_set_N/{input,output}_K.pb,
polygraphy is inputs.json and outputs.json. Each holds one graph, so one part is converted.

To compare another tool's outputs with a dump, give that dump with --like: the steps then get its
names, and qaic files, which have no dtypes, its dtypes.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``convert``."""
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SOURCE", type=Path, help="what to convert")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a new folder")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=_FORMATS, help="SOURCE is a dump; write this format")
    way.add_argument("--from", dest="origin", choices=_FORMATS, help="write a dump of this format")
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
        help="dtype of the graph tensors that match (qaic, repeatable)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and return 0."""
    from qeff_proxy.dump import read_dump

    _check(args)
    if args.to:
        _export(args)
        report = {"written": str(args.target), "format": args.to}
    else:
        _import(args)
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


def _check(args: argparse.Namespace) -> None:
    """Refuse options that this conversion does not use."""
    chosen = f"--to {args.to}" if args.to else f"--from {args.origin}"
    for option, uses in _USED_BY.items():
        if getattr(args, option) and chosen not in uses:
            from qeff_proxy.errors import UsageError

            raise UsageError(f"{chosen} has no use for --{option}", f"Use it with {uses[0]}.")


def _export(args: argparse.Namespace) -> None:
    from qeff_proxy.dump import convert as formats
    from qeff_proxy.dump import read_dump

    source = formats.ConversionSource(read_dump(args.source), args.part)
    if args.to == "qaic":
        formats.export_qaic(source, args.target)
    elif args.to == "onnx":
        formats.export_onnx(source, args.target, model=args.model)
    else:
        formats.export_polygraphy(source, args.target)


def _import(args: argparse.Namespace) -> None:
    from qeff_proxy.dump import convert as formats
    from qeff_proxy.dump import read_dump

    like: ConversionSource | None = None
    if args.like is not None:
        like = formats.ConversionSource(read_dump(args.like), args.part)
    if args.origin == "qaic":
        formats.import_qaic(
            args.source, args.target, like=like, part=args.part, dtypes=_dtypes(args.dtype)
        )
    elif args.origin == "onnx":
        formats.import_onnx(args.source, args.target, like=like, part=args.part, model=args.model)
    else:
        inputs, outputs = _polygraphy_files(args.source)
        formats.import_polygraphy(
            inputs, outputs, args.target, runner=args.runner, like=like, part=args.part
        )


def _polygraphy_files(source: Path) -> tuple[Path | None, Path | None]:
    """The files of inputs and outputs: both of a folder, or the one that was named."""
    if source.is_dir():
        inputs, outputs = source / "inputs.json", source / "outputs.json"
        return inputs if inputs.exists() else None, outputs if outputs.exists() else None
    try:
        with source.open("rb") as file:
            begins = file.read(64).lstrip()[:1]
    except OSError:
        begins = b""  # reading it as outputs reports what is wrong
    return (source, None) if begins == b"[" else (None, source)


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
