"""``qeff-proxy pack``: a folder with a dump's inputs, for a device's own tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.output import add_json_option, print_json, print_text

if TYPE_CHECKING:
    from qeff_proxy.device import PackOptions, Target

_EPILOG = """\
The folder has the inputs of each step, the tool's list, run.sh with the commands, and pack.json, by
which unpack knows which output belongs to which step. Copy it to the device, run the commands
there, and copy outputs/ back into it.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pack``."""
    parser.epilog = _EPILOG
    parser.add_argument("dump", metavar="DUMP", type=Path, help="the reference's dump")
    add_pack_options(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a new folder (default: DUMP-TARGET)"
    )
    add_json_option(parser)


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    """What `pack_options` reads."""
    from qeff_proxy.device.target import BUILTIN_TARGETS, GROUP
    from qeff_proxy.plugins.entry_points import find_entries

    names = sorted({*BUILTIN_TARGETS, *(entry.name for entry in find_entries(GROUP)[0])})
    parser.add_argument(
        "--for", dest="target", required=True, metavar="TARGET", help=f"one of {', '.join(names)}"
    )
    parser.add_argument(
        "--part", action="append", metavar="PART", help="a part to pack (default: body; repeatable)"
    )
    parser.add_argument(
        "--cache",
        choices=("reference", "device"),
        default="reference",
        help="reference: each step is fed the reference's cache (default); device: the device "
        "carries its own from step to step",
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="the export that ran (default: DUMP's)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows of the compiled binary")
    parser.add_argument(
        "--prefill-seq-len", type=int, metavar="N", help="tokens of its prefill chunk"
    )
    parser.add_argument(
        "--ctx-len", type=int, metavar="N", help="its positions; without lengths nothing is padded"
    )
    parser.add_argument(
        "--model", metavar="ONNX", type=Path, help="the part's graph, whose order counts (onnx)"
    )
    add_convention_options(parser)


def add_convention_options(parser: argparse.ArgumentParser) -> None:
    """Dtypes and layouts of the files."""
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        metavar="GLOB=DTYPE",
        help="dtype of the files of the graph tensors that match (repeatable)",
    )
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="GLOB=AXES",
        help="order of their axes: 'past_key*=B,S,H,D', 'pixel_values=NCHW>NHWC' (repeatable)",
    )


def pack_options(args: argparse.Namespace) -> tuple[Target, PackOptions]:
    """The target and the options that the arguments name."""
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.device import Conventions, PackOptions, load_target

    lengths = (args.batch_size, args.prefill_seq_len, args.ctx_len)
    shapes = None
    if any(length is not None for length in lengths):
        shapes = CompileOptions(
            batch_size=1 if args.batch_size is None else args.batch_size,
            prefill_seq_len=args.prefill_seq_len,
            ctx_len=args.ctx_len,
        )
    options = PackOptions(
        parts=args.part or [],
        cache=args.cache,
        export=args.export,
        shapes=shapes,
        conventions=Conventions.parse(args.dtype, args.layout),
    )
    return load_target(args.target, model=args.model), options


def run(args: argparse.Namespace) -> int:
    """Pack and return 0."""
    from qeff_proxy.device import pack_dump
    from qeff_proxy.dump import read_dump

    target, options = pack_options(args)
    dump = read_dump(args.dump)
    folder = args.output or Path(f"{dump.folder.resolve().name}-{target.name}")
    index = pack_dump(dump, folder, target, options)
    report: dict[str, Any] = {
        "written": str(folder),
        "target": index.target,
        "cache": index.cache,
        "groups": {group: len(runs) for group, runs in index.groups().items()},
    }
    if args.json:
        print_json(report)
        return 0
    print_text(f"Wrote {folder}: {len(index.runs)} runs in {', '.join(index.groups())}")
    print_text(f"Copy it to the device, run {folder}/run.sh there, copy outputs/ back, and run")
    print_text(f"    qeff-proxy unpack {folder} --like {args.dump}")
    return 0
