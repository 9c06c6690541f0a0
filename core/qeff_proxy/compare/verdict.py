"""The outcome of a comparison in words, for the terminal and the report alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.common.messages import counted, printable

if TYPE_CHECKING:
    from qeff_proxy.compare.results import Comparison, Divergence, TensorComparison

_SHOWN_LAYERS = 8


def format_error(value: float) -> str:
    """Return a number with three digits: ``0``, ``1.25e-06``."""
    return "0" if value == 0 else f"{value:.3g}"


def format_share(value: float) -> str:
    """Return an error over the peak as a percentage."""
    if not math.isfinite(value):
        return "NaN/Inf" if math.isnan(value) else "∞"
    if value >= 0.1:
        return f"{100 * value:.0f}%"
    return "0%" if value == 0 else f"{100 * value:.2g}%"


def model_named(provenance: Mapping[str, Any]) -> str:
    """The model that a dump says it is of; empty where it says none."""
    model = provenance.get("model")
    if isinstance(model, dict) and "source" in model:
        model = f"{model['source']} ({model.get('architecture', 'unknown architecture')})"
    return "" if model is None else printable(model)


def made_by(provenance: Mapping[str, Any]) -> str:
    """What made a dump: model and backend, where it says them."""
    backend = provenance.get("backend")
    known = (model_named(provenance), "" if backend is None else printable(backend))
    return ", ".join(one for one in known if one)


def rank_worst(comparison: Comparison) -> list[TensorComparison]:
    """Return all tensors: those that failed first, each group by its largest error over peak."""
    return sorted(
        comparison.tensors, key=lambda t: (t.passed, -float(max(t.step_error, default=0.0)))
    )


def describe_verdict(comparison: Comparison) -> list[str]:
    """Return the verdict, a paragraph a line; the first begins with PASSED or FAILED."""
    tensors = comparison.tensors
    failed = [t for t in tensors if not t.passed]
    count = sum(len(t.steps) for t in tensors)
    bad = sum(int((~t.step_passed).sum()) for t in tensors)
    names = {str(t.name) for t in tensors}
    scope = (
        f"{counted(len(names), 'tensor')} in {counted(len(comparison.steps), 'step')} "
        f"({counted(count, 'array')})"
    )
    if comparison.passed:
        said = f"{scope} is" if len(names) == 1 else f"all of {scope} are"
        lines = [f"PASSED: {said} within tolerance."]
    elif failed:
        bad_names = len({str(t.name) for t in failed})
        lines = [f"FAILED: of {scope}, {_differ(bad_names)}, in {counted(bad, 'array')}."]
    else:
        lines = [f"FAILED: {scope} are within tolerance, but the dumps do not match."]
    if comparison.first_divergence is not None:
        lines += _describe_divergence(comparison.first_divergence, failed)
        if (hint := _untapped(comparison.first_divergence, names)) is not None:
            lines.append(hint)
    if comparison.origin is not None:
        lines.append(_describe_origin(comparison.origin))
    lines += [f"Problem: {printable(problem)}." for problem in comparison.problems]
    lines += [f"Note: {printable(note)}." for note in comparison.notes]
    if comparison.problems:
        lines.append("To compare only what both dumps have, pass --partial.")
    return lines


def _differ(number: int) -> str:
    return counted(number, "tensor differs", "tensors differ")


def _describe_origin(origin: Divergence) -> str:
    where = "no layer" if origin.layer is None else f"layer {origin.layer}"
    return (
        f"First difference: {where}, {origin.tensor} in {origin.step}, by "
        f"{format_share(origin.error)} of its peak. That is within tolerance, but all that was "
        "computed before it is exactly equal."
    )


def _describe_divergence(first: Divergence, failed: list[TensorComparison]) -> list[str]:
    what = next(t for t in failed if str(t.name) == first.tensor)
    where = "no layer" if first.layer is None else f"layer {first.layer}"
    lines = [f"First divergence: {where}, {first.tensor} in {first.step}."]
    lines.append(f"  {what.why}.")
    if first.is_input:
        lines.append(
            "  It is an input: the two runs were fed different things there, so what follows "
            "says nothing about the layers."
        )
    elif first.before is not None:
        lines.append(f"  The tensor computed before it, {first.before}, passed.")
    later = [(at, e) for at, e in first.growth if e > 0]
    if len(later) > 1 and not first.is_input:
        shown = later
        if len(later) > _SHOWN_LAYERS:
            step = (len(later) - 1) / (_SHOWN_LAYERS - 1)
            shown = [later[round(i * step)] for i in range(_SHOWN_LAYERS)]
        grown = " → ".join(f"{at} {format_share(e)}" for at, e in shown)
        lines.append(f"  Error over the reference's peak, from there: {grown}.")
    if what.problem is None:
        lines.append(f"  Held to {what.tolerance}; to accept more: --tol '{_accepting(failed)}'.")
    return lines


def _untapped(first: Divergence, names: set[str]) -> str | None:
    """What a divergence does not tell without layer taps: caches show only a layer's inputs."""
    layered = any(".present_" in name for name in names)
    if first.is_input or not layered or any(".hidden_states" in name for name in names):
        return None
    if first.layer == 0:
        where = "what comes before the layers"
    elif first.layer is not None:
        where = f"layer {first.layer - 1}, after its keys and values"
    else:
        where = "the last layer"
    return (
        f"  The fault may also be in {where}: without layer taps only caches tell the layers. "
        "Run again on an export with --taps layers."
    )


def _accepting(failed: list[TensorComparison]) -> str:
    """A tolerance that all of these pass: for the one tensor, or for all."""
    glob = str(failed[0].name) if len({str(t.name) for t in failed}) == 1 else "*"
    errors = [float(np.nanmax(t.step_error)) for t in failed if np.isfinite(t.step_error).any()]
    limits = [f"peak:{_round_up(max(errors, default=1.0))}"]
    ratios = [float(np.nanmin(t.step_sqnr)) for t in failed if t.tolerance.sqnr is not None]
    if ratios and math.isfinite(min(ratios)):
        limits.append(f"sqnr:{math.floor(min(ratios))}")
    return f"{glob}={','.join(limits)}"


def _round_up(value: float) -> str:
    if not math.isfinite(value) or value <= 0:
        return "1"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit * 1.000001) * unit:.2g}"
