"""``qeff-proxy inspect MODEL``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qeff_proxy.cli.options import add_model_options, loaded_of
from qeff_proxy.cli.output import format_bytes, print_json, print_text, stage_display
from qeff_proxy.tensor_names import PAST_INPUTS

if TYPE_CHECKING:
    from rich.table import Table

    from qeff_proxy.cut.inspect_model import Inspection


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_options(parser, exports=False)


def run(args: argparse.Namespace) -> int:
    """Print the sites that would be cut, and the parts."""
    loaded, hooks = loaded_of(args)
    with stage_display("inspecting", quiet=args.json) as progress:
        from qeff_proxy.cut.inspect_model import inspect_model

        progress("cutting and verifying")
        inspection = inspect_model(loaded, hooks)
    if args.json:
        print_json(inspection.to_json())
    else:
        print_text(_table(inspection))
    return 0


def _table(inspection: Inspection) -> Table:
    from rich.table import Table

    from qeff_proxy.sites import Absent

    table = Table(title=f"{inspection.source}: {inspection.architecture}", show_header=False)
    table.add_row("model type", inspection.model_type)
    table.add_row("plugin", inspection.plugin)
    table.add_row("dtype", inspection.dtype)
    for name, site in inspection.sites.items():
        if isinstance(site, Absent):
            text = f"none: {site.reason}"
        else:
            scale = f", times {site.scale:g}" if site.scale is not None else ""
            follows = f", then {', '.join(site.follows)}" if site.follows else ""
            text = f"{site.module}{scale}{follows}"
        table.add_row(name.replace("_", " "), text)
    table.add_row("tied", "yes" if inspection.tied else "no")
    for kind in inspection.layers:
        details = f" ({', '.join(kind['says'])})" if kind["says"] else ""
        table.add_row(
            "layers",
            f"{len(kind['layers'])} x {kind['class']}{details}: {_ranges(kind['layers'])}",
        )
    total = inspection.body_bytes + inspection.vocabulary_bytes
    table.add_row("parameters", f"{inspection.parameters:,}")
    table.add_row("stays in the body", format_bytes(inspection.body_bytes))
    share = inspection.vocabulary_bytes / total if total else 0.0
    table.add_row("cut out", f"{format_bytes(inspection.vocabulary_bytes)} ({share:.0%})")
    for name, tensors in inspection.parts.items():
        table.add_row(f"part {name}", f"{_few(tensors['takes'])} → {_few(tensors['gives'])}")
    if any(
        name.endswith(PAST_INPUTS) for one in inspection.parts.values() for name in one["gives"]
    ):
        table.add_row("each step", "runs over all positions: the model keeps no usable cache")
    if inspection.report is not None:
        table.add_row(
            "verified",
            f"largest difference {inspection.report.max_difference:.2g} of "
            f"{inspection.report.largest_value:.3g} over {inspection.report.positions} positions"
            + _run_layers(inspection),
        )
    return table


def _run_layers(inspection: Inspection) -> str:
    total = sum(len(kind["layers"]) for kind in inspection.layers)
    count = inspection.verified_layers
    return f", with {count} of {total} layers" if count is not None and count < total else ""


def _ranges(numbers: list[int]) -> str:
    """``0-2, 4, 6-8``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _few(names: list[str]) -> str:
    """The names, with those of the cache combined into one."""
    plain = [name for name in names if not name.startswith(("past_key_values.", "present."))]
    cached = sorted({name.split(".")[0] for name in names if name not in plain})
    return ", ".join([*plain, *(f"{name}.*" for name in cached)])
