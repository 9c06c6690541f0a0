"""A verification by layer as a page per backend: local and inherited error of each piece."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.messages import counted
from qeff_proxy.compare.report import fill_page, json_number, write_page
from qeff_proxy.compare.verdict import format_error, model_named
from qeff_proxy.errors import DumpError
from qeff_proxy.verify.by_layer.results import (
    BackendLayers,
    LayerError,
    LayerResult,
    LayerVerification,
    describe_layers,
)
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.run_facts import facts_of_backend
from qeff_proxy.verify.verify_backend import report_path

_HINT = (
    "Local: on PyTorch's inputs, what the piece adds. Inherited: on the backend's own results of "
    "all that ran before."
)
_CONTINUATION = "the prompt again, from its start; nothing is generated"
_WORST = 6


def write_layer_reports(
    verification: LayerVerification,
    export: Export,
    options: VerifyOptions,
    inputs: Mapping[str, Any],
) -> LayerVerification:
    """Write a page per backend, where one was asked for; warn of one that cannot be written.

    Args:
        verification: What is shown, be it of all pieces or of those that ran.
        export: What the backends ran.
        options: Of the verification.
        inputs: The input, as JSON values.

    Returns:
        The verification, with the places of the pages.
    """
    results = []
    for result in verification.results:
        path = report_path(options.html, result.backend, several=len(verification.results) > 1)
        if path is not None:
            continued = any(step.startswith("decode") for step in verification.steps)
            text = ", ".join(map(str, options.continuation)) or _CONTINUATION
            output = {"continuation": text} if continued else {}
            chosen = options.compile_for(result.backend)
            facts = facts_of_backend(export, result.backend, chosen, inputs, output)
            page = build_layer_report(verification, result, model_named(vars(export)), facts)
            try:
                write_page(page, path)
            except DumpError as error:  # the errors of all layers must not be lost for a page
                warnings.warn(str(error), UserWarning, stacklevel=2)
                path = None
        results.append(replace(result, report=path))
    return replace(verification, results=tuple(results))


def build_layer_report(
    verification: LayerVerification, result: BackendLayers, model: str, facts: Mapping[str, str]
) -> str:
    """Return the page of a backend."""
    layers = result.layers
    local, inherited = (
        [_row(piece, whose) for piece in layers] for whose in ("local", "inherited")
    )
    series = {"local": local, "inherited": inherited}
    ranked = sorted(layers, key=lambda piece: (piece.local.passed, -piece.local.over_peak))
    return fill_page(
        f"Verification by layer: {model}",
        f"{counted(len(layers), 'piece')} in {counted(len(verification.steps), 'step')} compared",
        describe_layers(result, verification),
        facts,
        {
            "axis": "piece, in the order of the computation",
            "places": _places(layers),
            "names": [piece.name for piece in layers],
            "series": [
                {"name": whose, "points": [{**row, "place": at} for at, row in enumerate(rows)]}
                for whose, rows in series.items()
                if rows
            ],
            "decibels": {
                whose: points
                for whose, rows in series.items()
                if (
                    points := [
                        {**row, "place": at}
                        for at, row in enumerate(rows)
                        if isinstance(row["sqnr"], float)
                    ]
                )
            },
            "tensors": [row for both in zip(local, inherited, strict=True) for row in both],
            "worst": [_card(piece) for piece in ranked if piece.local.over_peak or piece.error][
                :_WORST
            ],
            "first_place": next((at for at, row in enumerate(local) if not row["passed"]), None),
            "first_text": "first fault of its own",
        },
        passed=result.passed and verification.interrupted is None,
        thing="piece",
        hint=_HINT,
    )


def _places(layers: Sequence[LayerResult]) -> list[str]:
    """The marks of the axis: a layer's number, after its part's name where that changes."""
    parts = [None, *(piece.part for piece in layers)]
    return [
        str(piece.layer)
        if piece.part == before and piece.layer is not None
        else piece.name.replace(" layer ", " ")
        for before, piece in zip(parts, layers, strict=False)
    ]


def _row(piece: LayerResult, whose: str) -> dict[str, Any]:
    """One of a piece's errors, for the table and the plots.

    SQNR, floor and limit are of the kind of tensor that is nearest to its limit; without a floor,
    the SQNR is the least.
    """
    error = piece.local if whose == "local" else piece.inherited
    kind = error.nearest
    where = f"{error.tensor} in {error.step}" if piece.error is None else piece.error
    return {
        "name": piece.name,
        "whose": whose,
        "max_abs": json_number(error.max_abs),
        "at": where if error.max_abs or piece.error else "",
        "error": json_number(error.over_peak if piece.error is None else math.inf),
        "sqnr": json_number(error.sqnr if kind is None else kind.sqnr),
        "floor": None if kind is None else json_number(kind.floor),
        "limit": None if kind is None else json_number(kind.limit),
        "step": where,
        "kind": "the least of its outputs" if kind is None else kind.kind,
        "passed": error.passed,
        "verdict": "ok" if error.passed else "FAILED" if piece.error is None else "ERROR",
    }


def _errors(piece: LayerResult) -> list[tuple[str, LayerError]]:
    """Its two errors; none where it did not run."""
    return [] if piece.error else [("local", piece.local), ("inherited", piece.inherited)]


def _card(piece: LayerResult) -> dict[str, Any]:
    lines = [] if piece.error is None else [piece.error]
    for whose, error in _errors(piece):
        where = f"{error.tensor} in {error.step}"
        lines.append(f"{whose}: {where}, max {format_error(error.max_abs)}, {error.sqnr:.1f} dB")
        if (kind := error.nearest) is not None:
            lines.append(
                f"nearest to its limit: {kind.kind}, {kind.sqnr:.1f} dB; floor {kind.floor:.1f}, "
                f"limit {kind.limit:.1f}"
            )
    return {
        "name": piece.name,
        "error": json_number(piece.local.over_peak if piece.error is None else math.inf),
        "passed": piece.local.passed,
        "lines": lines,
    }
