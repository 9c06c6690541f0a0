"""``qeff-proxy run-on``: pack, run a command, unpack and compare."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from qeff_proxy.cli.compare import add_compare_options, compare_and_print
from qeff_proxy.cli.output import add_json_option
from qeff_proxy.cli.pack import add_pack_options, pack_options
from qeff_proxy.cli.unpack import add_unpack_options, conventions_of, report_unpacked

_EPILOG = """\
COMMAND runs in the packed folder; {folder} is its path, {outputs} that of outputs/ in it, and {run}
the target's own commands (run.sh). So where the tool is installed here, COMMAND is '{run}'; with a
device behind ssh:
'ssh lab rm -rf packed && scp -r {folder} lab:packed && ssh lab sh packed/run.sh &&
scp -r lab:packed/outputs {folder}'.

Exit status: as compare; 8 when the command fails.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``run-on``."""
    parser.epilog = _EPILOG
    parser.add_argument("command_template", metavar="COMMAND", help="what runs the packed folder")
    parser.add_argument("dump", metavar="DUMP", type=Path, help="the reference's dump")
    add_pack_options(parser)
    add_unpack_options(parser)
    add_compare_options(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="keep the packed folder and the dump here"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run, compare, and return 0 when all passed, else 1."""
    from qeff_proxy.common.messages import printable
    from qeff_proxy.device.run_on import run_on
    from qeff_proxy.dump import read_dump

    target, options = pack_options(args)
    args.dtype, args.layout = [], []  # the index has them
    conventions = conventions_of(args)
    with ExitStack() as stack:
        folder = args.output
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qeff-proxy-")))
        result = run_on(
            args.command_template,
            read_dump(args.dump),
            folder,
            target,
            options,
            conventions,
            show=lambda line: print(printable(line), file=sys.stderr, flush=True),
        )
        if not args.json:
            report_unpacked(result, args)
        if args.tensors is None:
            parts = options.parts or sorted({name.split(".")[0] for name in _names(result.folder)})
            args.tensors = [f"{part}.out.*" for part in parts]
        return compare_and_print(args, args.dump, result.folder)


def _names(folder: Path) -> list[str]:
    from qeff_proxy.dump import read_dump

    return read_dump(folder).names()
