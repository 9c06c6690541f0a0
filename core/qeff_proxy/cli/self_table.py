"""The table of ``qeff-proxy verify --self``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qeff_proxy.verify.self_check import SelfVerification


def self_lines(verification: SelfVerification) -> Iterator[RenderableType]:
    """For each backend a table of the arrangements, and where they disagree."""
    from rich.table import Table
    from rich.text import Text

    from qeff_proxy.common.messages import printable
    from qeff_proxy.compare.verdict import format_share

    for result in verification.results:
        if result.error is not None:
            yield Text(f"{result.backend}: ERROR: {printable(result.error)}")
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(result.backend)
        table.add_column("verdict")
        table.add_column("first that disagrees")
        for heading in ("of peak", "SQNR dB"):
            table.add_column(heading, justify="right")
        table.add_column("worst tensor", overflow="fold")
        for one in result.arrangements:
            verdict = Text("agrees", "green") if one.passed else Text("FAILED", "red")
            sqnr = "exact" if one.error.sqnr == math.inf else f"{one.error.sqnr:.1f}"
            worst = f"{one.error.tensor}" if one.error.over_peak else ""
            if one.failure is not None:
                verdict, sqnr = Text("ERROR", "red"), ""
            share = format_share(one.error.over_peak)
            table.add_row(one.name, verdict, one.first or "", share, sqnr, worst)
        yield table
        for one in result.arrangements:
            if one.failure is not None:
                yield Text(f"{result.backend}: {one.name}: {printable(one.failure)}")
        yield ""
    yield Text("each arrangement has the same tokens as the input alone, in one chunk")
    yield Text(f"export: {verification.export}")
