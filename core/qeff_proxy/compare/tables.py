"""A comparison as tables for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qeff_proxy.common.messages import printable
from qeff_proxy.compare.results import Comparison, TensorComparison
from qeff_proxy.compare.verdict import (
    describe_verdict,
    format_error,
    format_share,
    made_by,
    rank_worst,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_comparison(comparison: Comparison, *, rows: int = 12) -> list[RenderableType]:
    """Return what to print: the two dumps, the tensors that are worst, the verdict.

    Args:
        comparison: What to show.
        rows: Tensors to list; 0 for all of them.
    """
    from rich.table import Table
    from rich.text import Text

    dumps = Table(show_header=False, box=None, pad_edge=False)
    for label, folder, provenance in (
        ("reference", comparison.reference, comparison.reference_provenance),
        ("candidate", comparison.candidate, comparison.candidate_provenance),
    ):
        dumps.add_row(label, Text(printable(folder)), Text(made_by(provenance)))
    ranked = rank_worst(comparison)
    shown = ranked[:rows] if rows else ranked
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    table.add_column("phase", no_wrap=True)
    for heading in ("passed", "max", "of peak", "SQNR dB", "mean", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in shown:
        table.add_row(*_row(tensor))
    out: list[RenderableType] = [dumps, "", table]
    if len(shown) < len(ranked):
        out.append(f"… and {len(ranked) - len(shown)} more (--all shows them)")
    out.append("")
    for number, line in enumerate(describe_verdict(comparison)):
        style = ("bold green" if comparison.passed else "bold red") if number == 0 else ""
        out.append(Text(line, style=style))
    return out


def _row(tensor: TensorComparison) -> list[RenderableType]:
    from rich.text import Text

    worst = tensor.worst
    label = str(tensor.name)
    if tensor.reference_dtype != tensor.candidate_dtype:
        label += f" ({tensor.reference_dtype} / {tensor.candidate_dtype})"
    steps = f"{int(tensor.step_passed.sum())}/{len(tensor.steps)}"
    verdict = Text("ok", "green") if tensor.passed else Text("FAILED", "red")
    if worst is None:
        return [verdict, label, tensor.phase, steps, "", "", "", "", ""]
    return [
        verdict,
        label,
        tensor.phase,
        steps,
        format_error(worst.max_abs) if not worst.unmatched else "NaN/Inf",
        format_share(float(max(tensor.step_error))),
        "exact" if math.isinf(worst.sqnr) and worst.sqnr > 0 else f"{worst.sqnr:.1f}",
        format_error(worst.mean_abs),
        f"{worst.cosine:.5f}",
    ]
