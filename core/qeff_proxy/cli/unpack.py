"""``qeff-proxy unpack``: a dump of what a device's tools wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.output import add_json_option, print_json, print_text
from qeff_proxy.cli.pack import add_convention_options
from qeff_proxy.common.messages import printable

if TYPE_CHECKING:
    from qeff_proxy.device import Conventions, Unpacked

_EPILOG = """\
FOLDER is one that pack wrote, with the device's outputs in it (or at --outputs). Files that a tool
wrote by itself are read with --from: onnx, polygraphy, and those that packages add. Steps and
tensors that did not come back are listed, and are missing in the dump.
"""
_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``unpack``."""
    parser.epilog = _EPILOG
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what came back")
    parser.add_argument("--like", metavar="DUMP", type=Path, help="the dump that was packed")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="the new dump (default: FOLDER-dump)"
    )
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="where the outputs are")
    parser.add_argument(
        "--from", dest="origin", metavar="FORMAT", help="FOLDER is of this tool, not of pack"
    )
    parser.add_argument("--part", metavar="PART", help="the part that ran (with --from)")
    parser.add_argument(
        "--steps", metavar="STEP,…", help="which step each run is (with --from), if it says none"
    )
    parser.add_argument(
        "--model", metavar="ONNX", type=Path, help="names outputs that have no name (onnx)"
    )
    add_convention_options(parser)
    add_unpack_options(parser)
    add_json_option(parser)


def add_unpack_options(parser: argparse.ArgumentParser) -> None:
    """What only the way back needs."""
    parser.add_argument(
        "--quantized",
        action="append",
        default=[],
        metavar="GLOB=DTYPE,scale:S,offset:N",
        help="integers that stand for scale * (integer + offset) (repeatable)",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="FILE=TENSOR",
        help="the tensor that a file holds; empty to leave the file out (repeatable)",
    )
    parser.add_argument(
        "--rows",
        choices=("whole", "front", "back", "new"),
        default="whole",
        help="where a cache's valid rows are in its file: as in the packed inputs, in front of "
        "which padding is (default), at the front or back, or only those that the step added",
    )
    parser.add_argument("--runner", metavar="NAME", help="whose outputs to read (polygraphy)")


def conventions_of(args: argparse.Namespace) -> Conventions:
    """The options as one object."""
    from qeff_proxy.device import Conventions

    return Conventions.parse(args.dtype, args.layout, args.quantized, args.name, args.rows)


def run(args: argparse.Namespace) -> int:
    """Unpack, report, and return 0."""
    from qeff_proxy.device import import_recorded, load_target, unpack_outputs
    from qeff_proxy.device.index import read_index
    from qeff_proxy.dump import read_dump
    from qeff_proxy.errors import UsageError

    conventions = conventions_of(args)
    output = args.output or Path(f"{args.folder.resolve().name}-dump")
    like = read_dump(args.like) if args.like is not None else None
    options = {"model": args.model, "runner": args.runner}
    if args.origin is not None:
        if args.outputs is not None:
            raise UsageError("--outputs is for a packed folder", "Name the outputs as FOLDER.")
        result = import_recorded(
            args.folder,
            load_target(args.origin, **options),
            output,
            like=like,
            part=args.part,
            steps=args.steps.split(",") if args.steps else (),
            conventions=conventions,
        )
    else:
        index = read_index(args.folder)
        if like is None:
            raise UsageError(f"{args.folder} was packed from a dump", "Name it: --like DUMP.")
        for option, value in (("--part", args.part), ("--steps", args.steps)):
            if value is not None:
                raise UsageError(f"{option} is for --from", "pack.json says it here.")
        target = load_target(index.target, **options)
        result = unpack_outputs(args.folder, target, index, like, output, conventions, args.outputs)
    report_unpacked(result, args)
    return 0


def report_unpacked(result: Unpacked, args: argparse.Namespace) -> None:
    """Say what came back and what did not."""
    if args.json:
        print_json(
            {
                "written": str(result.folder),
                "cache": result.cache,
                "steps": result.steps,
                "tensors": result.tensors,
                "missing": result.missing,
                "ignored": result.ignored,
            }
        )
        return
    print_text(f"Wrote {result.folder}: {result.tensors} tensors in {result.steps} steps")
    for what, said in (("Missing", result.missing), ("Ignored", result.ignored)):
        if said:
            names = [printable(name) for name in said]
            more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
            print_text(f"{what}: {', '.join(names[:_SHOWN])}{more}")
