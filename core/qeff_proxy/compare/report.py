"""A comparison as one self-contained page: plots, heat map, table, no network."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.common.messages import counted, printable
from qeff_proxy.common.write_whole import write_whole
from qeff_proxy.compare.report_facts import facts_of_dumps, shortened
from qeff_proxy.compare.report_file import check_report_place
from qeff_proxy.compare.verdict import (
    describe_verdict,
    format_error,
    made_by,
    model_named,
    rank_worst,
)
from qeff_proxy.errors import DumpError

if TYPE_CHECKING:
    from qeff_proxy.compare.results import Comparison, TensorComparison

MAX_COLUMNS = 240
_WORST = 6
_LONGEST_FACT = 1000  # letters
_NO_LAYER = 1_000_000  # what belongs to no layer comes out after all of them


def write_report(
    comparison: Comparison, path: str | PathLike[str], facts: Mapping[str, str] | None = None
) -> None:
    """Write the report of ``comparison`` to ``path``; ``facts`` are as for `build_report`.

    Raises:
        DumpError: It cannot be written, or would replace a file of a dump or of an export. What
            stood there is as it was.
    """
    write_page(build_report(comparison, facts), path)


def write_page(page: str, path: str | PathLike[str]) -> None:
    """Write a page to ``path``; raises as `write_report` does."""
    check_report_place(path)
    try:
        write_whole(path, page)
    except OSError as error:
        raise DumpError(f"the report {path} cannot be written: {error.strerror}") from error


def build_report(comparison: Comparison, facts: Mapping[str, str] | None = None) -> str:
    """Return the page.

    Args:
        comparison: What it shows.
        facts: What else is known of the runs (input, versions …), by its name.
    """
    model = model_named(comparison.reference_provenance)
    data = {
        **_layer_series(comparison),
        "heat": _heat_map(comparison),
        "tensors": [_row(t) for t in comparison.tensors],
        "worst": [_card(t) for t in rank_worst(comparison) if _error(t) != 0.0][:_WORST],
    }
    dumps = (
        ("reference", comparison.reference, comparison.reference_provenance),
        ("candidate", comparison.candidate, comparison.candidate_provenance),
    )
    made = {
        label: " · ".join(one for one in (str(folder), made_by(provenance)) if one)
        for label, folder, provenance in dumps
    }
    return fill_page(
        "Dump comparison" + (f": {model}" if model else ""),
        f"{counted(len(comparison.steps), 'step')} compared",
        describe_verdict(comparison),
        {**(facts or facts_of_dumps(comparison)), **made},
        data,
        passed=comparison.passed,
    )


def fill_page(
    title: str,
    subtitle: str,
    verdict: Sequence[str],
    facts: Mapping[str, str],
    data: Mapping[str, Any] | None = None,
    *,
    passed: bool = False,
    thing: str = "tensor",
    hint: str = "",
    drawing: str = "",
) -> str:
    """Return a page; the sections that ``data`` has nothing for are hidden.

    Args:
        title: Of the page.
        subtitle: Below it.
        verdict: A paragraph a line.
        facts: What is known of the run, by its name.
        data: What the plots and the table show, as the script of the page reads it.
        passed: Whether the verdict is good.
        thing: What a row of the table is about.
        hint: What the series of the plot by layer are.
        drawing: HTML to insert below the verdict.
    """
    empty: dict[str, Any] = {
        "series": [],
        "decibels": {},
        "places": [],
        "names": [],
        "tensors": [],
        "worst": [],
    }
    heat: dict[str, Any] = {"columns": [], "rows": []}
    content = {**empty, "heat": heat, "first_place": None, "thing": thing, **(data or {})}
    # "</script>" in a name must not end the element that holds the data.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    package = files("qeff_proxy.compare")
    page = package.joinpath("report.html").read_text(encoding="utf-8")
    values = {
        "TITLE": html.escape(title),
        "SUBTITLE": html.escape(subtitle),
        "VERDICT": _verdict(verdict, facts, passed=passed),
        "DRAWING": drawing,
        "THINGS": f"{thing}s",
        "HINT": html.escape(hint),
        "SCRIPT": package.joinpath("report.js").read_text(encoding="utf-8"),
        "DATA": text,
    }
    # In one pass: a value may hold what looks like a mark.
    return re.sub("@([A-Z]+)@", lambda mark: values.get(mark[1], mark[0]), page)


def _verdict(lines: Sequence[str], facts: Mapping[str, str], *, passed: bool) -> str:
    out = [f'<section class="card verdict{" pass" if passed else ""}" id="verdict">']
    out.append(f'<p class="head">{html.escape(lines[0])}</p>')
    out += [f"<p>{html.escape(line.strip())}</p>" for line in lines[1:]]
    out.append('<dl class="dumps">')
    for label, text in facts.items():
        shown = html.escape(shortened(printable(text), _LONGEST_FACT))
        out.append(f"<dt>{html.escape(printable(label))}</dt><dd>{shown}</dd>")
    out.append("</dl></section>")
    return "".join(out)


def json_number(value: float) -> float | str | None:
    """Return a JSON value: ``inf`` as text, an undefined number as None."""
    if math.isnan(value):
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else "inf"


def _error(tensor: TensorComparison) -> float:
    return float(tensor.step_error[_worst_step(tensor)]) if len(tensor.steps) else 0.0


def _worst_step(tensor: TensorComparison) -> int:
    """The step with the largest error over peak, of those that failed if any did."""
    return int(np.lexsort((tensor.step_error, ~tensor.step_passed))[-1])


def _shows_failure(tensor: TensorComparison) -> bool:
    """Whether its worst element is of a step that failed, where any did: not of other shapes."""
    return tensor.passed or tensor.first_failure is not None


def _badness(point: dict[str, Any]) -> tuple[bool, float]:
    return not point["passed"], float(point["error"])


def _row(tensor: TensorComparison) -> dict[str, Any]:
    worst = tensor.worst
    same = tensor.reference_dtype == tensor.candidate_dtype
    return {
        "name": str(tensor.name),
        "phase": tensor.phase,
        "layer": tensor.name.layer,
        "steps": len(tensor.steps),
        "failed": int((~tensor.step_passed).sum()),
        "max_abs": json_number(worst.max_abs) if worst else None,
        "at": f"{worst.step} {list(worst.max_abs_at)}"
        if worst and worst.max_abs and _shows_failure(tensor)
        else "",
        "mean_abs": json_number(worst.mean_abs) if worst else None,
        "max_rel": json_number(worst.max_rel) if worst else None,
        "error": json_number(_error(tensor)),
        "sqnr": json_number(worst.sqnr) if worst else None,
        "cosine": round(worst.cosine, 8) if worst and math.isfinite(worst.cosine) else None,
        "dtype": tensor.reference_dtype
        if same
        else f"{tensor.reference_dtype} / {tensor.candidate_dtype}",
        "floor": json_number(tensor.floor.sqnr) if tensor.floor is not None else None,
        "limit": tensor.tolerance.sqnr,
        "tolerance": str(tensor.tolerance),
        "passed": tensor.passed,
        "verdict": "ok" if tensor.passed else "FAILED",
        "why": tensor.why,
    }


def _card(tensor: TensorComparison) -> dict[str, Any]:
    worst = tensor.worst
    lines = [f"{int((~tensor.step_passed).sum())} of {len(tensor.steps)} {tensor.phase} steps fail"]
    if tensor.problem:
        lines.append(tensor.problem)
    if worst is not None and _shows_failure(tensor):
        lines.append(
            f"{worst.step} {list(worst.max_abs_at)}: {worst.reference_there:.6g} became "
            f"{worst.candidate_there:.6g}"
        )
        lines.append(
            f"max {format_error(worst.max_abs)}, mean {format_error(worst.mean_abs)}, "
            f"SQNR {worst.sqnr:.1f} dB, cosine {worst.cosine:.6f}"
        )
        nan = (worst.reference_nan, worst.candidate_nan, worst.reference_inf, worst.candidate_inf)
        if any(nan):
            lines.append("NaN {} / {}, infinite {} / {} (reference / candidate)".format(*nan))
    return {
        "name": f"{tensor.phase} {tensor.name}",
        "error": json_number(_error(tensor)),
        "passed": tensor.passed,
        "lines": lines,
    }


def _main_part(comparison: Comparison) -> str | None:
    """Return the part with the first divergence if it has layers, else the one with most."""
    counts: dict[str, int] = {}
    for tensor in comparison.tensors:
        if tensor.name.layer is not None and tensor.name.direction == "out":
            counts[tensor.name.part] = counts.get(tensor.name.part, 0) + 1
    first = comparison.first_divergence
    if first is not None and (part := first.tensor.split(".")[0]) in counts:
        return part
    return max(counts, key=lambda part: counts[part]) if counts else None


def _layer_series(comparison: Comparison) -> dict[str, Any]:
    part = _main_part(comparison)
    chosen = [
        t
        for t in comparison.tensors
        if t.name.part == part and t.name.direction == "out" and t.name.layer is not None
    ]
    layers = sorted({t.name.layer for t in chosen if t.name.layer is not None})
    series: dict[str, dict[int, dict[str, Any]]] = {}
    for tensor in chosen:
        place = layers.index(tensor.name.layer)  # type: ignore[arg-type]
        worst = _worst_step(tensor)
        point = {
            "place": place,
            "error": json_number(float(tensor.step_error[worst])),
            "passed": tensor.passed,
            "step": comparison.steps[tensor.steps[worst]].label,
        }
        known = series.setdefault(tensor.name.tensor, {}).get(place)
        if known is None or _badness(point) > _badness(known):  # of prefill and decode the worse
            series[tensor.name.tensor][place] = point
    first = comparison.first_divergence
    at_first = first is not None and first.layer in layers and first.tensor.startswith(f"{part}.")
    return {
        "axis": f"layer of {part}",
        "places": layers,
        "names": [f"layer {layer}" for layer in layers],
        "series": [
            {"name": name, "points": [points[p] for p in sorted(points)]}
            for name, points in series.items()
        ],
        "decibels": _decibel_series(chosen, layers),
        "first_text": "first divergence",
        "first_place": layers.index(first.layer) if at_first and first else None,  # type: ignore[arg-type]
    }


def _decibel_series(
    tensors: list[TensorComparison], layers: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """SQNR, floor and limit by layer of the tensors with floors, of the worse phase."""
    series: dict[str, dict[int, dict[str, Any]]] = {}
    for tensor in tensors:
        layer, limit, sqnr = tensor.name.layer, tensor.tolerance.sqnr, tensor.step_sqnr.min()
        if layer is None or limit is None or tensor.floor is None or not math.isfinite(sqnr):
            continue
        point = {
            "place": layers.index(layer),
            "sqnr": json_number(sqnr),
            "floor": json_number(tensor.floor.sqnr),
            "limit": limit,
            "kind": tensor.phase,
            "passed": tensor.passed,
        }
        known = series.setdefault(tensor.name.tensor, {}).get(layer)
        if known is None or sqnr - limit < known["sqnr"] - known["limit"]:
            series[tensor.name.tensor][layer] = point
    return {name: [points[layer] for layer in sorted(points)] for name, points in series.items()}


def _heat_map(comparison: Comparison) -> dict[str, Any]:
    """Return rows (layers) of columns (steps, or runs of steps): worst error, passed, whose."""
    count = len(comparison.steps)
    width = max(1, math.ceil(count / MAX_COLUMNS))
    columns = [
        comparison.steps[at].label
        + (f" to {comparison.steps[min(at + width, count) - 1].label}" if width > 1 else "")
        for at in range(0, count, width)
    ]
    rows: dict[tuple[int, str, int], tuple[str, list[list[Any] | None]]] = {}
    parts = list(dict.fromkeys(t.name.part for t in comparison.tensors))
    layered = {t.name.part for t in comparison.tensors if t.name.layer is not None}
    for tensor in comparison.tensors:
        name = tensor.name
        if name.direction == "in":
            continue
        layer = _NO_LAYER if name.layer is None else name.layer
        many = len(layered) > 1
        label = f"{name.part} outputs" if name.layer is None else f"layer {layer}"
        label = f"{name.part} {label}" if many and name.layer is not None else label
        key = (parts.index(name.part), name.part, layer)
        _, cells = rows.setdefault(key, (label, [None] * len(columns)))
        for position, error, passed in zip(
            tensor.steps, tensor.step_error, tensor.step_passed, strict=True
        ):
            cell = cells[position // width]
            if cell is None:
                cell = cells[position // width] = [-1.0, True, ""]
            if (not passed, error) > (not cell[1], cell[0]):
                cell[:] = float(error), bool(passed), name.tensor
    ordered = [rows[key] for key in sorted(rows)]
    for _, cells in ordered:
        for cell in cells:
            if cell is not None:
                cell[0] = json_number(cell[0])
    return {"columns": columns, "rows": [{"label": k, "cells": cells} for k, cells in ordered]}
