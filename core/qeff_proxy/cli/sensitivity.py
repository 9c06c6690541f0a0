"""``qeff-proxy sensitivity MODEL --backend B --precision P``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qeff_proxy.cli.backend_options import (
    add_backend_option,
    add_shape_options,
    compile_options_of,
    options_by_backend,
)
from qeff_proxy.cli.inputs import add_input_options, request_of
from qeff_proxy.cli.options import (
    add_model_options,
    check_place,
    existing_export_of,
    kind_of,
    loaded_of,
)
from qeff_proxy.cli.output import print_json, print_text, stage_display
from qeff_proxy.common.messages import printable
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.precision.distance import Distance
    from qeff_proxy.precision.sensitivity import Row, Sensitivity
    from qeff_proxy.verify.options import VerifyOptions

_EPILOG = """\
Each layer and each kind of module is in the precision alone, with the rest in float32, and then
alone in float32, with the rest in the precision. dB and KL are those of the model's last outputs.
One layer is in memory at a time, and nothing is compiled: docs/precision.md says what is simulated.
"""
_SHOWN = 8


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """The model, its input, and which precision of which backend."""
    add_model_options(parser, exports=True)
    parser.add_argument("--backend", default="onnxruntime", help="default: onnxruntime")
    parser.add_argument(
        "--precision",
        required=True,
        metavar="NAME",
        help="fp16, bf16, int8, int4, a16w8 or a8w8, as far as the backend has it",
    )
    add_input_options(parser)
    add_shape_options(parser)
    add_backend_option(parser, "BACKEND.NAME=VALUE", "an option of the backend")


def verify_options_of(args: argparse.Namespace, **more: Any) -> VerifyOptions:
    """The options of export and backend."""
    from qeff_proxy.verify.options import VerifyOptions

    if args.taps not in (None, "layers"):
        raise UsageError(f"--taps {args.taps}: the layers are tapped", "Leave it out.")
    return VerifyOptions(
        kind=kind_of(args),
        output=args.output,
        opset=args.opset,
        force=args.force,
        wait=not args.no_wait,
        compile=compile_options_of(args),
        backends=options_by_backend(args, [args.backend]),
        **more,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EPILOG
    add_precision_options(parser)
    parser.add_argument(
        "--each", action="store_true", help="measure each module of each layer, too"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return 0."""
    request = request_of(args)
    check_place(args)
    with stage_display("measuring", quiet=args.json) as progress:
        progress("loading libraries")
        from qeff_proxy.precision import measure_sensitivity
        from qeff_proxy.precision.prepare import with_precision

        options = with_precision(verify_options_of(args), args.backend, args.precision)
        export = existing_export_of(args)
        model, hooks = (export, None) if export is not None else loaded_of(args)
        found = measure_sensitivity(
            model,
            args.backend,
            args.precision,
            request,
            options,
            each=args.each,
            hooks=hooks,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    if args.json:
        print_json(found.to_json())
    else:
        for line in _lines(found):
            print_text(line)
    return 0


def _lines(found: Sensitivity) -> Iterator[RenderableType]:
    yield f"{found.source} in {found.precision} for {found.backend}: {found.how}."
    yield f"All of it low: {describe_distance(found.low)}"
    for title, rows in (("layer", found.layers), ("kind", found.kinds), ("unit", found.units)):
        if rows:
            yield ""
            yield _table(title, rows, found.low)
    yield ""
    for one in found.ranges[:_SHOWN]:
        yield printable(f"{one.name} {one.describe()}.")
    if len(found.ranges) > _SHOWN:
        yield f"… and {len(found.ranges) - _SHOWN} more; --json has them all."
    if not any(one.overflows for one in found.ranges):
        yield "No number of it overflows in fp16 on this input."


def describe_distance(one: Distance) -> str:
    """``37.6 dB, KL 1.4e-03, same first token at 95.0% of 40 positions``."""
    said = decibels(one.sqnr)
    if one.kl is not None and one.top1 is not None:
        said += f", KL {one.kl:.1e}, same first token at {one.top1:.1%} of {one.positions}"
        said += " positions"
    return said


def decibels(value: float) -> str:
    """``37.6 dB``."""
    from qeff_proxy.verify.by_layer.results import format_decibels

    return format_decibels(value)


def _table(title: str, rows: Sequence[Row], low: Distance) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    kl = low.kl is not None
    columns = [title, "weights", "low: dB", *(["KL"] if kl else []), "wide: gain dB"]
    for column in (*columns, *(["KL"] if kl else [])):
        table.add_column(column, justify="left" if column == title else "right")
    for row in rows:
        cells = [printable(row.name), f"{row.share:.1%}", f"{row.low.sqnr:.1f}"]
        cells += [f"{row.low.kl:.1e}"] if row.low.kl is not None else [""] * kl
        cells += [f"{row.wide.sqnr - low.sqnr:+.1f}"]
        cells += [f"{row.wide.kl:.1e}"] if row.wide.kl is not None else [""] * kl
        table.add_row(*cells)
    return table
