"""The page of what `coverage.py` measured."""

from __future__ import annotations

import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from small_models import LAYERS

__all__ = ["table"]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a page in Markdown."""
    packages = ("transformers", "torch", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        "# Architectures, measured",
        "",
        f"`benchmarks/coverage.py` on {datetime.now(UTC):%-d %B %Y}, Python "
        f"{platform.python_version()}, {versions}: every architecture of a mapping of transformers,"
        f" {LAYERS} layers deep, with shaken random weights, run in ONNX Runtime and compared with "
        "PyTorch: all logits within 0.1% of the largest. *Not built*: this script makes no small "
        "model of it that runs, and its export, if it can be built, is not refused. *Refused*: "
        "with the reason given, before or at the export.",
        "",
        "`make coverage` measures it anew: hours, of which what `coverage.json` has is not done "
        "again. Results that were looked at by hand are in [Families](families.md).",
    ]
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        own = sorted((r for r in rows if r["mapping"] == mapping), key=lambda r: r["model_type"])
        counts = Counter(row["verdict"] for row in own)
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        lines += ["", f"## {mapping}: {summary}", "", "| model type | | |", "| --- | --- | --- |"]
        for row in own:
            why = row["why"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{row['model_type']}` | {row['verdict']} | {why} |")
    return "\n".join([*lines, ""])
