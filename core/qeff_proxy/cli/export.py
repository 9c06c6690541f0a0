"""``qeff-proxy export MODEL``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.cli.options import add_model_options, export_of, known_export_of
from qeff_proxy.cli.output import format_bytes, print_json, print_text
from qeff_proxy.common.messages import counted

if TYPE_CHECKING:
    from rich.table import Table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_options(parser, exports=True)
    parser.add_argument(
        "--num-layers",
        metavar="N",
        help="export only the first N layers; auto: the fewest that have every kind of layer "
        "twice, to try a compiler on a large model",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print the files of each part."""
    export = known_export_of(args) or export_of(args)[0]
    if args.json:
        print_json({"folder": str(export.folder), **export.to_json()})
    else:
        print_text(parts_table(export))
        report = export.cut["verified"]
        if report is not None:
            print_text(
                f"verified: largest difference {report['max_difference']:.2g} of "
                f"{report['largest_value']:.3g} over {report['positions']} positions"
            )
        for line in _notes(export):
            print_text(line)
        print_text(f"{export.folder}")
    return 0


def _notes(export: Export) -> list[str]:
    """Remarks: adapters, kept codes, how many layers were run, absent taps, what it stands for."""
    merged = [f"{one['path']} times {one['weight']:g}" for one in export.cut.get("adapters", ())]
    lines = [f"merged: {', '.join(merged)}"] if merged else []
    if kept := export.cut.get("kept"):
        lines.append(f"kept as the checkpoint's codes: {counted(sum(kept.values()), 'weight')}")
    layers = export.cut.get("layers")
    if layers is not None and layers["verified"] < layers["count"]:
        lines.append(
            f"run: {layers['verified']} of {counted(layers['count'], 'layer')}, of "
            f"{counted(len(layers['kinds']), 'kind')}; "
            "the others repeat their graphs with their own weights"
        )
    if absent := export.settings.get("absent_taps"):
        lines.append(f"not tapped, since no layer has them: {', '.join(absent)}")
    stands_for = export.cut.get("stands_for")
    if stands_for is not None:
        lines.append(
            f"stands for {counted(stands_for['layers'], 'layer')} by its {stands_for['kept']}; "
            "its outputs are not the model's"
        )
    return lines


def parts_table(export: Export) -> Table:
    """The parts of an export with their files and sizes."""
    from rich.table import Table

    table = Table(title=f"{export.model['source']} · {export.kind} · {export.dtype}")
    for column in ("part", "graph", "size", "weights"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for part in export.parts:
        size = (export.folder / part.file).stat().st_size
        weights = (
            f"{part.weights} ({format_bytes(export.files[part.weights])})"
            if part.weights
            else "none"
        )
        table.add_row(part.name, part.file, format_bytes(size), weights)
    return table
