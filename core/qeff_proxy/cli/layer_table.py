"""The table of ``qeff-proxy verify --by-layer``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from qeff_proxy.verify.by_layer.results import LayerError, LayerVerification


def layer_lines(verification: LayerVerification) -> Iterator[RenderableType]:
    """For each backend a table of its layers, and which are out of line."""
    from rich.table import Table
    from rich.text import Text

    from qeff_proxy.common.messages import printable
    from qeff_proxy.verify.by_layer.results import describe_layers

    for result in verification.results:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(result.backend, no_wrap=True)
        table.add_column("verdict")
        floors = any(layer.local.kinds for layer in result.layers)
        more = ("floor", "limit") if floors else ()
        for heading in ("local dB", *more, "of peak", "inherited dB", *more, "of peak"):
            table.add_column(heading, justify="right")
        table.add_column("worst tensor", overflow="fold")
        for layer in result.layers:
            if layer.error is not None:
                blank = [""] * (len(table.columns) - 3)
                table.add_row(layer.name, Text("ERROR", "red"), *blank, printable(layer.error))
                continue
            errors = layer.local, layer.inherited
            numbers = [text for error in errors for text in _shown(error, floors=floors)]
            worst = f"{layer.local.tensor} in {layer.local.step}" if layer.local.over_peak else ""
            if layer.local.nearest is not None:
                worst = layer.local.nearest.kind
            table.add_row(layer.name, _verdict(layer.local, layer.inherited), *numbers, worst)
        yield table
        yield from map(Text, describe_layers(result, verification))
        yield ""
    yield Text(f"steps: {len(verification.steps)}, the same tokens on PyTorch and all backends")
    yield Text(f"export: {verification.export}")
    for result in verification.results:
        if result.report is not None:
            yield Text(f"report: {result.report}")


def _verdict(local: LayerError, inherited: LayerError) -> Text:
    from rich.text import Text

    if not local.passed:
        return Text("FAILED", "red")
    return Text("passed", "green") if inherited.passed else Text("inherits", "yellow")


def _shown(error: LayerError, *, floors: bool) -> list[str]:
    """The error in dB, of the kind of tensor that is nearest to its limit, and over the peak."""
    from qeff_proxy.compare.verdict import format_share

    nearest = error.nearest
    values = [error.sqnr] if nearest is None else [nearest.sqnr, nearest.floor, nearest.limit]
    shown = ["exact" if value == math.inf else f"{value:.1f}" for value in values]
    shown += [""] * (3 * floors - len(shown))
    return [*shown, format_share(error.over_peak)]
