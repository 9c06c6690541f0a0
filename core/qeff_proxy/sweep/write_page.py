"""The nights of a ledger as one self-contained page: what changed, every cell, and its history."""

from __future__ import annotations

import html
import json
import math
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import counted, printable
from qeff_proxy.compare.report import write_page as write_file
from qeff_proxy.compare.verdict import format_share
from qeff_proxy.sweep.compare_nights import Change, NightComparison
from qeff_proxy.sweep.ledger import Record

_REMEMBERED = 40  # records of a cell's history in the page
_CROWDED = 5000  # cells, above which there are fewer
_LONGEST = 300  # characters of a reason
_LETTERS = {"passed": "p", "failed": "f", "refused": "r", "error": "e"}


def write_page(nights: NightComparison, path: Path) -> None:
    """Write the page.

    Raises:
        DumpError: It cannot be written, or would replace a file of a dump or of an export.
    """
    base = path.resolve().parent
    names = [name.partition("/") for name in nights.records]
    models = list(dict.fromkeys(model for model, _, _ in names))
    columns = list(dict.fromkeys(rest for _, _, rest in names))
    row, column = ({each: place for place, each in enumerate(e)} for e in (models, columns))
    kept = _REMEMBERED if len(names) <= _CROWDED else 8
    data = {
        "models": [printable(each) for each in models],
        "columns": [printable(each) for each in columns],
        "cells": [
            [row[model], column[rest], *_cell(nights, f"{model}{slash}{rest}", base, kept)]
            for model, slash, rest in names
        ],
    }
    package = files("qeff_proxy.sweep")
    values = {
        "SUBTITLE": html.escape(_subtitle(nights)),
        "CLASS": "" if _is_bad(nights) else " pass",
        "HEAD": html.escape(describe_outcome(nights)),
        "CHANGES": "".join(_item(change, nights, base) for change in nights.changes),
        # "</script>" in a name must not end the element that holds the data.
        "DATA": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = package.joinpath("page.html").read_text(encoding="utf-8")
    write_file(re.sub("@([A-Z]+)@", lambda mark: values.get(mark[1], mark[0]), page), path)


def describe_outcome(nights: NightComparison) -> str:
    """The outcome of the later night in one line."""
    counts: dict[str, int] = {}
    for record in nights.records.values():
        verdict = record.verdict if record is not None else "not run"
        counts[verdict] = counts.get(verdict, 0) + 1
    said = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    worse = sum(change.worse for change in nights.changes)
    other = len(nights.changes) - worse
    return f"{worse} got worse, {counted(other, 'other change')}; {said}"


def _subtitle(nights: NightComparison) -> str:
    between = f"{nights.before} → {nights.after}" if nights.before else f"{nights.after} alone"
    return printable(f"{nights.ledger.name}, {between}; {counted(len(nights.records), 'cell')}")


def _is_bad(nights: NightComparison) -> bool:
    if nights.before is not None:
        return nights.worse
    return any(each is None or each.verdict != "passed" for each in nights.records.values())


def _item(change: Change, nights: NightComparison, base: Path) -> str:
    """One change, with links to both reports."""
    links = "".join(
        f' <a href="{html.escape(link)}">{word}</a>'
        for word, record in (("before", change.before), ("after", change.after))
        if record is not None and (link := _link(record, nights, base))
    )
    at = f"<b>{html.escape(printable(change.at))}</b> " if change.at else ""
    kind = "no" if change.worse else "ok" if change.better else "sub"
    return (
        f'<li><span class="{kind}">{"worse" if change.worse else change.kind}</span> '
        f"<code>{html.escape(printable(change.name))}</code> {at}"
        f"{html.escape(printable(change.what))}{links}</li>"
    )


def _link(record: Record, nights: NightComparison, base: Path) -> str:
    """The address of a report, relative to the page."""
    place = nights.ledger.resolve().parent / (record.report or "")
    if record.report is None or not place.is_file():
        return ""
    return "/".join(part.replace("%", "%25") for part in Path(os.path.relpath(place, base)).parts)


def _cell(nights: NightComparison, name: str, base: Path, kept: int) -> list[Any]:
    """Verdicts a letter each, errors in log10 of peak, a note, and a link."""
    record = nights.records[name]
    if record is None:
        return ["", [], "not run", ""]
    past = nights.history[name][-kept:]
    letters = "".join(_LETTERS.get(each.verdict, "x") for each in past)
    logs = [round(math.log10(each.error), 1) if each.error else None for each in past]
    where = str(record.divergence) if record.divergence is not None else record.reason
    error = f", {format_share(record.error)} of peak" if record.error is not None else ""
    note = f"{record.verdict}{error}{': ' if where else ''}{where[:_LONGEST]}"
    return [letters, logs, printable(note), _link(record, nights, base)]
