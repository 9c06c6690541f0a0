"""``qeff-proxy recipe MODEL --backend B --precision P --target-sqnr DB``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.cli.backend_options import add_calibration_option
from qeff_proxy.cli.inputs import request_of
from qeff_proxy.cli.options import check_place, existing_export_of, loaded_of
from qeff_proxy.cli.output import print_json, print_text, stage_display
from qeff_proxy.cli.sensitivity import (
    add_precision_options,
    describe_distance,
    verify_options_of,
)
from qeff_proxy.common.messages import counted, printable
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from qeff_proxy.precision.make_recipe import Result

_EPILOG = """\
Everything is in the precision at first. Modules become float32 one by one, the one first that takes
away the most noise for its weights, until the goal is reached; the search simulates, as qeff-proxy
sensitivity does. The whole model is then compiled with the recipe, run on the backend and compared
with PyTorch: that is the proof. --recipe FILE obeys it in compile, generate and verify.
Exit status: 0, or 1 when the goal is not reached, and nothing is written then.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    add_precision_options(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target-sqnr", type=_number, metavar="DB", help="dB at the last outputs")
    goal.add_argument(
        "--same-tokens", action="store_true", help="the same first token at every position"
    )
    goal.add_argument(
        "--max-wide",
        type=_percent,
        metavar="PERCENT",
        help="the most dB with so much of the weights wide, such as 5%%",
    )
    parser.add_argument(
        "--write",
        type=Path,
        default=Path("recipe.toml"),
        metavar="FILE",
        help="default: recipe.toml",
    )
    parser.add_argument(
        "--nodes",
        type=Path,
        metavar="DIR",
        help="write the nodes of the export that stay wide, too, as the backend's own tools read "
        "them",
    )
    parser.add_argument(
        "--no-proof", action="store_true", help="believe the simulation: run no backend"
    )
    add_calibration_option(parser)


def _percent(text: str) -> float:
    value = _number(text.removesuffix("%")) / 100
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("a share is above 0% and at most 100%")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def run(args: argparse.Namespace) -> int:
    """Make a recipe, write it, and return 0 where the goal is reached, else 1."""
    if not args.write.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {args.write.parent} to write to", "Make it.")
    if args.write.is_dir() or (args.nodes is not None and args.nodes.is_file()):
        place = args.write if args.write.is_dir() else args.nodes
        kind = "folder" if place == args.write else "file"
        raise UsageError(f"{place} is a {kind}", "--write names a file, --nodes a folder.")
    request = request_of(args)
    check_place(args)
    with stage_display("searching", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.backends.recipe import write_nodes
        from qeff_proxy.precision import Goal, make_recipe
        from qeff_proxy.precision.prepare import with_precision

        options = verify_options_of(
            args,
            calibration=args.calibrate and args.calibrate.expanduser(),
        )
        options = with_precision(options, args.backend, args.precision)  # before a model is read
        export = existing_export_of(args)
        model, hooks = (export, None) if export is not None else loaded_of(args)
        result = make_recipe(
            model,
            args.backend,
            args.precision,
            Goal(args.target_sqnr, args.same_tokens, args.max_wide),
            request,
            options,
            prove=not args.no_proof,
            hooks=hooks,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    files = []
    if result.reached:
        result.recipe.write(args.write)
        files = [args.write]
        if args.nodes is not None:
            files += write_nodes(result.recipe, result.export, args.backend, args.nodes)
    if args.json:
        print_json({**result.to_json(), "files": [str(path) for path in files]})
    else:
        for line in _lines(result, files, by_share=args.max_wide is not None):
            print_text(line)
    return 0 if result.reached else 1


def _lines(result: Result, files: list[Path], *, by_share: bool) -> Iterator[str]:
    recipe, found = result.recipe, result.found
    yield f"{recipe.source} in {recipe.precision} for {recipe.backend}: {result.how}."
    yield f"All of it low: {describe_distance(found.low)}"
    wide = counted(len(recipe.wide), "module")
    yield f"{wide} wide, {found.share:.1%} of the weights: {describe_distance(found.distance)}"
    yield from (f"  {printable(name)}" for name in recipe.wide)
    if by_share and found.recovered is not None:
        less = "" if found.recovered >= 0.5 else "; none of them takes half of it away"
        sets = f"the best of the {counted(found.measured, 'set')} that were measured{less}"
        yield f"{found.recovered:.0%} of the noise is gone, to 0.1 dB {sets}."
    if not found.left:
        yield f"Everything is wide: no module is left in {recipe.precision}."
    if result.before is not None and result.after is not None:
        yield (
            f"Proof: on {recipe.backend} the last outputs go from "
            f"{describe_distance(result.before)} to {describe_distance(result.after)}."
        )
    else:
        yield "Nothing was proven: these numbers are those of the simulation."
    if not result.reached:
        failed = "gains nothing" if by_share else "does not reach the goal"
        yield f"It {failed}, and was not written."
    yield from (f"{path}" for path in files)
