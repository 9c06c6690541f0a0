"""What caused an error, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.isolate.blame import RUNS
from qeff_proxy.isolate.neighbourhood import Neighbour
from qeff_proxy.verify.by_layer.results import LayerError, format_decibels, layer_name

_NO_CAPSULE = "No capsule was written"


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that an operator reads or gives, as the reference has it.

    Attributes:
        name: Its name in the graph.
        dtype: Its dtype.
        shape: Its shape in the step looked at.
        low: Its smallest element; ``None`` where it has none that is finite.
        high: Its largest.
        weight: Whether it is a weight, or follows from weights alone.
        remarks: What is unusual in its values, in words.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    weight: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperatorFacts:
    """One operator.

    Attributes:
        operator: Its type, such as ``MatMul``.
        node: Its name in the ONNX graph.
        module: The module it was traced from, as the model names it: ``model.layers.4.mlp``.
        source: Class, file and line of that module's ``forward``; ``None`` where not known.
        weights: The weights it uses.
        inputs: What it reads.
        outputs: What it gives.
    """

    operator: str
    node: str
    module: str
    source: str | None
    weights: tuple[str, ...]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]


@dataclass(frozen=True)
class WorstElement:
    """The element of a faulty operator's output that is furthest off.

    Attributes:
        tensor: The output.
        index: Where it is.
        expected: The reference's value.
        actual: The backend's, on the same inputs.
    """

    tensor: str
    index: tuple[int, ...]
    expected: float
    actual: float


@dataclass(frozen=True)
class Cause:
    """Operators that cause a layer's error: one, or a group that cannot be told apart.

    Attributes:
        operators: The operators, in order.
        error: The layer's largest error over its peak with only these on the backend; infinite
            where it refuses them.
        remaining: That with all but these, and the causes named before, on the backend; ``None``
            where the backend refuses the others alone.
        shown: In how many of `qeff_proxy.isolate.blame.RUNS` runs of these alone it showed.
        worst: The worst element of their outputs.
        refused: Why the backend takes no smaller group, or not these; ``None`` where it did.
        around: They, what they read and what reads them.
    """

    operators: tuple[OperatorFacts, ...]
    error: float
    remaining: float | None
    shown: int
    worst: WorstElement | None
    refused: str | None = None
    around: tuple[Neighbour, ...] = ()

    @property
    def name(self) -> str:
        """``MatMul node_MatMul_45 (model.layers.4.mlp.down_proj)``, of the first and the last."""
        names = [f"{o.operator} {o.node}" for o in self.operators]
        modules = [o.module for o in self.operators if o.module]
        where = f" ({modules[-1]})" if modules else ""
        return f"{names[0]} to {names[-1]}{where}" if len(names) > 1 else f"{names[0]}{where}"


@dataclass(frozen=True)
class Fault:
    """What `qeff_proxy.isolate.isolate_fault` found.

    Attributes:
        source: The checkpoint or export, as the user named it.
        backend: The backend.
        part: The part that the layer is in; empty where no layer is at fault.
        layer: The layer; ``None`` for what follows a part's last one.
        step: The step looked at, such as ``prefill-0000``.
        operators: How many operators the layer has.
        local: The layer's error on the reference's inputs; where no layer is at fault, the largest.
        inherited: Its error on the backend's own results so far, where that alone is too large;
            else ``None``.
        whole: Its largest error over its peak at the fixed shapes of this step; ``None`` where the
            backend refuses it.
        refused: Why the backend did not run the layer; ``None`` where it did.
        causes: The operators that cause it, the worst first.
        unexplained: Why there are no causes, or what they leave open; empty where nothing is.
        before: The error of the model's last outputs on the backend's own results.
        after: The same with the causes exact.
        capsule: The file to send, where one was asked for.
        notes: Anything else that must be known.
        exports: Whether two exports were compared; ``backend`` is the second's folder.
        interrupted: Whether Ctrl-C ended the run before its proof.
        dumps: Whether two dumps were; ``backend`` is the device's, ``source`` the export.
    """

    source: str
    backend: str
    part: str = ""
    layer: int | None = None
    step: str = ""
    operators: int = 0
    local: LayerError = field(default_factory=LayerError)
    inherited: LayerError | None = None
    whole: float | None = 0.0
    refused: str | None = None
    causes: tuple[Cause, ...] = ()
    unexplained: str = ""
    before: LayerError | None = None
    after: LayerError | None = None
    capsule: Path | None = None
    notes: tuple[str, ...] = ()
    exports: bool = False
    dumps: bool = False
    interrupted: bool = False

    @property
    def found(self) -> bool:
        """Whether operators were named."""
        return bool(self.causes)

    @property
    def healthy(self) -> bool:
        """Whether every layer is within its tolerances."""
        return not self.part

    @property
    def passed(self) -> bool:
        """Whether all layers, or the one that was named, are within their tolerances."""
        within = self.local.passed and self.inherited is None and self.refused is None
        return self.healthy or within

    @property
    def where(self) -> str:
        """``body layer 3``."""
        return layer_name(self.part, self.layer)

    def to_json(self) -> dict[str, Any]:
        """The fault as a JSON object; numbers that are infinite are None."""
        capsule = None if self.capsule is None else str(self.capsule)
        plain: dict[str, Any] = plain_json(replace(self, capsule=None))
        plain["capsule"] = capsule
        return {"found": self.found, "where": self.where if self.part else None, **plain}


def describe_fault(fault: Fault) -> list[str]:
    """The fault in words, a paragraph a line."""
    if fault.healthy:
        same = "computes the same" if fault.exports else "no layer is out of line"
        same = "every value follows from those before it" if fault.dumps else same
        return [f"{fault.backend}: {same}; there is no fault to find.", *fault.notes]
    lines = [
        f"{fault.backend} does not run {fault.where}: {fault.refused}"
        if fault.refused
        else f"{fault.backend}: at {fault.where} the errors of all layers add up to "
        f"{describe_error(fault.inherited)}."
        if fault.inherited is not None
        else f"{fault.backend}: nothing is at fault in {fault.where}: {_measured(fault)}."
        if fault.local.passed
        else f"{fault.backend}: {fault.where} is out of line: {_measured(fault)}."
    ]
    for cause in fault.causes:
        lines += _describe_cause(cause, fault)
    if fault.before is not None and fault.after is not None:
        lines.append(
            f"Proof: with {'it' if len(fault.causes) == 1 else 'them'} exact, the error of "
            f"{fault.after.tensor or 'the outputs'} goes from {_decibels(fault.before)} to "
            f"{_decibels(fault.after)}."
        )
    if fault.unexplained:
        lines.append(fault.unexplained)
    lines += fault.notes
    if fault.capsule is not None:
        lines.append(f"Capsule: {fault.capsule}")
    return lines


def describe_error(error: LayerError) -> str:
    """An error in words, with its limit where it is within."""
    if error.remark:
        return f"{error.remark} in {error.tensor}"
    nearest = error.nearest
    if nearest is not None:
        floor = f"PyTorch in this precision has {nearest.floor:.1f} dB"
        return f"{nearest.kind} {nearest.sqnr:.1f} dB (limit {nearest.limit:.1f} dB; {floor})"
    limit = f"; limit {error.limit}" if error.passed and error.limit else ""
    return f"{_decibels(error)} ({_of_peak(error.over_peak)}{limit})"


def note_capsule(fault: Fault, asked: Path | None) -> Fault:
    """Say why a capsule that was asked for was not written."""
    if asked is None or fault.capsule is not None or any(_NO_CAPSULE in n for n in fault.notes):
        return fault
    why = "the backend gave no values for it" if fault.found else "no operator was named"
    why = "there is no fault to show" if fault.passed else why
    return replace(fault, notes=(*fault.notes, f"{_NO_CAPSULE}: {why}."))


def _measured(fault: Fault) -> str:
    error = fault.local
    if fault.dumps:
        off = f"is off by {format_share(error.over_peak)} of its peak"
        off = f"has {error.remark}" if error.remark else off
        return f"{error.tensor} {off}, on the device's own values before it, in {error.step}"
    where = f"on the reference's inputs, worst in {error.step or fault.step}"
    return f"{describe_error(error)} {where}"


def _decibels(error: LayerError) -> str:
    return error.remark or format_decibels(error.sqnr)


def _describe_cause(cause: Cause, fault: Fault) -> list[str]:
    refused = fault.whole is None
    where = "of the second export" if fault.exports else "on the backend"
    where = "as the device gave it" if fault.dumps else where
    lines = [f"{'Most of its error' if fault.local.passed else 'Cause'}: {cause.name}."]
    if len(cause.operators) > 1:
        fewer = "it takes fewer" if refused else "fewer show no fault"
        fewer = "the dump has no value between them" if fault.dumps else fewer
        why = f"it refuses fewer: {cause.refused}" if cause.refused and not refused else fewer
        listed = ", ".join(f"{o.operator} {o.node}" for o in cause.operators)
        lines.append(f"It is a group of {len(cause.operators)} operators ({why}): {listed}.")
    alone = f"Only this {where}, all else exact: {_of_peak(cause.error)}"
    if fault.dumps:
        lines.append(
            f"{alone}. The layer's other values follow from those before them, to "
            f"{format_share(cause.remaining)}."
        )
    elif refused:
        lines.append(f"The backend refuses this: {cause.refused}")
    elif cause.remaining is None:
        lines.append(f"{alone}; the backend refuses the other operators without it.")
    else:
        lines.append(f"{alone}. All but this {where}: {format_share(cause.remaining)}.")
    if cause.shown < RUNS:
        lines.append(f"It does not show each time: in {cause.shown} of {RUNS} runs.")
    if cause.worst is not None:
        worst = cause.worst
        lines.append(
            f"Worst element: {worst.tensor}{list(worst.index)} is {worst.actual:.6g} instead of "
            f"{worst.expected:.6g}."
        )
    for operator in cause.operators:
        if operator.weights:
            lines.append(f"{operator.node} uses {', '.join(operator.weights)}.")
        remarks = [
            f"{t.name}: {r}" for t in (*operator.inputs, *operator.outputs) for r in t.remarks
        ]
        lines += [f"{remark}." for remark in dict.fromkeys(remarks)]
    sources = dict.fromkeys(o.source for o in cause.operators if o.source)
    lines += [f"Source: {source}." for source in sources]
    return lines


def format_share(share: float | None) -> str:
    """A share of the peak in percent."""
    if share is None or not math.isfinite(share):
        return "not finite" if share is not None else "unknown"
    return f"{100 * share:.3g}%"


def _of_peak(share: float) -> str:
    return f"{format_share(share)} of the peak" if math.isfinite(share) else "not finite"
