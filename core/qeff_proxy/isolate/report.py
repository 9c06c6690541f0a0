"""A fault as one self-contained page: the verdict, and the operators around the cause drawn."""

from __future__ import annotations

import html
from collections.abc import Sequence
from os import PathLike

from qeff_proxy.compare.report import fill_page, write_page
from qeff_proxy.compare.report_facts import today
from qeff_proxy.isolate.neighbourhood import Neighbour
from qeff_proxy.isolate.results import Cause, Fault, describe_fault, format_share

_WIDTH, _HEIGHT = 250, 74
_GAP_X, _GAP_Y = 24, 46
_LETTERS = 32


def write_fault_report(fault: Fault, path: str | PathLike[str]) -> None:
    """Write the page of a fault.

    Raises:
        DumpError: It cannot be written, or would replace a file of a dump or of an export.
    """
    write_page(build_fault_report(fault), path)


def build_fault_report(fault: Fault) -> str:
    """Return the page."""
    source, other = "model", "backend"
    if fault.exports:
        source, other = "first export", "second export"
    elif fault.dumps:
        source, other = "export", "device's dump"
    facts = {source: fault.source, other: fault.backend, "date": today()}
    if not fault.healthy:
        facts |= {"layer": f"{fault.where}, {fault.operators} operators", "step": fault.step}
    drawings = "".join(_section(cause, fault) for cause in fault.causes)
    lines = describe_fault(fault)
    return fill_page("Fault", fault.source, lines, facts, drawing=drawings, passed=fault.passed)


def _section(cause: Cause, fault: Fault) -> str:
    where = "of the second export" if fault.exports else "on the backend"
    where = "as the device gave it" if fault.dumps else where
    hint = (
        "Outlined in red: the cause. Errors are those of each operator's outputs, over their peak, "
        f"with only the cause {where}."
    )
    return (
        f'<section class="card"><h2>{html.escape(cause.name)}</h2>'
        f'<p class="hint">{hint}</p>{draw(cause.around)}</section>'
    )


def draw(around: Sequence[Neighbour]) -> str:
    """Draw a neighbourhood from top to bottom, as an SVG picture of the page's colours."""
    rows = _rows(around)
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        return ""
    width = columns * (_WIDTH + _GAP_X) + _GAP_X
    height = len(rows) * (_HEIGHT + _GAP_Y)
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (_WIDTH + _GAP_X) + _GAP_X) / 2
        for column, one in enumerate(row):
            places[one.node] = (
                left + column * (_WIDTH + _GAP_X),
                _GAP_Y / 2 + number * (_HEIGHT + _GAP_Y),
            )
    lines = [_line(places[name], places[one.node]) for one in around for name in one.reads]
    boxes = [_box(one, *places[one.node]) for one in around]
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="Operators around the cause">{"".join([*lines, *boxes])}</svg>'
    )


def _rows(around: Sequence[Neighbour]) -> list[list[Neighbour]]:
    """Operators by how many others of the neighbourhood are on the longest way to them."""
    depth: dict[str, int] = {}
    rows: list[list[Neighbour]] = []
    for one in around:  # in the order in which they run
        depth[one.node] = max((depth[name] + 1 for name in one.reads if name in depth), default=0)
        while len(rows) <= depth[one.node]:
            rows.append([])
        rows[depth[one.node]].append(one)
    return rows


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + _WIDTH / 2, start[1] + _HEIGHT
    x2, y2 = end[0] + _WIDTH / 2, end[1]
    middle = (y1 + y2) / 2
    return (
        f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" '
        'fill="none" stroke="var(--soft)"/>'
    )


def _box(one: Neighbour, x: float, y: float) -> str:
    cause = one.role == "cause"
    colours = "var(--bad-back);stroke:var(--bad)" if cause else "var(--page);stroke:var(--line)"
    shape = " x ".join(map(str, one.shape)) or "one number"
    texts = (one.operator, _short(one.node), f"{shape} · error {format_share(one.error)}")
    styles = ("fill:var(--ink);font-weight:650;font-size:14px", "", "fill:var(--ink)")
    shown = "".join(
        f'<text x="{x + 12:g}" y="{y + 22 + 21 * row:g}" style="{style}">{html.escape(text)}</text>'
        for row, (text, style) in enumerate(zip(texts, styles, strict=True))
    )
    return (
        f'<g><title>{html.escape(one.node)}</title><rect x="{x:g}" y="{y:g}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" rx="8" style="fill:{colours};stroke-width:{2 if cause else 1}"/>'
        f"{shown}</g>"
    )


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
