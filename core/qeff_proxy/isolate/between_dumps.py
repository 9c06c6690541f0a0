"""Isolate a fault in a device's dump: the operators between two of its values.

Operators run one by one on the CPU, from the device's own values: where its dump has what an
operator gives, those after it read the device's value. So each value is judged by what lies between
it and those before it alone, and errors do not add up. What the device's dump lacks (inputs, the
cache it was fed) is the reference's. As many operators can be told apart as the dump has taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.common.file_errors import reading
from qeff_proxy.common.messages import counted
from qeff_proxy.compare.tolerances import COMPUTED_IN, Tolerances
from qeff_proxy.device.part_source import PartSource
from qeff_proxy.dump import Dump, StepInfo
from qeff_proxy.errors import DumpError
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.isolate.between_exports import operators_between
from qeff_proxy.isolate.blame import RUNS, distance, over_peak
from qeff_proxy.isolate.capsule import check_capsule_place, pack
from qeff_proxy.isolate.describe import describe_operator, worst_element
from qeff_proxy.isolate.neighbourhood import neighbourhood
from qeff_proxy.isolate.operators import Operators, PlainRuntime, Values
from qeff_proxy.isolate.results import Cause, Fault, describe_error, note_capsule
from qeff_proxy.tensor_names import PAST, PRESENT, TAP
from qeff_proxy.verify.by_layer.results import LayerError, compare_layer, layer_name

#: So many operators between two values are still named.
_MOST_NAMED = 32


def isolate_dumps(
    reference: Dump,
    device: Dump,
    export: Export,
    *,
    tolerances: Tolerances | None = None,
    capsule: Path | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Fault:
    """Find the first operators of a device that give what does not follow from what they read.

    Args:
        reference: The dump that the device was fed from.
        device: Its dump. The more taps both have, the fewer operators are between two of them.
        export: What the device ran, or the same model's with at least its taps.
        tolerances: How far a value may be off; by default as `compare` does.
        capsule: Write the operators to this file, with the device's values.
        progress: Called with the name of each stage as it starts.

    Raises:
        DumpError: The dumps have no part or step in common, or are not of this export.
        UnsupportedModelError: The export is in bfloat16.
    """
    if capsule is not None:
        check_capsule_place(capsule)
    limits = tolerances or Tolerances()
    precision = device.provenance.get("precision")
    if limits.precision is None and precision in COMPUTED_IN:
        limits = replace(limits, precision=precision)
    blank = late = Fault(str(export.folder), str(device.folder), dumps=True)
    both = _parts(reference) & _parts(device)
    common = [part for part in export.parts if part.name in both]
    if not common:
        raise DumpError(
            f"{reference.folder} and {device.folder} have no part of {export.folder} in common",
            "Name two dumps of one run, and the export that it is of.",
        )
    largest = LayerError()
    for part in common:
        run = _Run(part, reference, device, limits)
        with reading(export.folder):
            whole = ir.load(export.folder / part.file)
        for graph in split_layers(whole, part.inputs, part.outputs):
            progress(layer_name(part.name, graph.layer))
            plain = PlainRuntime(graph.model)
            for step in run.steps:
                operators, measured = run.on_device(graph, step, plain)
                wrong, most = _first_wrong(operators, measured, part.name, step, limits)
                largest = max(largest, most, key=lambda error: error.over_peak)
                if wrong is not None:
                    found = _Found(part, graph, step, operators, *wrong)
                    fault = found.fault(blank, precision)
                    if not run.follows_in_reference(found, plain):
                        fault = replace(
                            fault,
                            causes=(),
                            unexplained=f"The reference's own {found.name} does not follow from "
                            "this export's operators either: name the export that it ran.",
                        )
                    return note_capsule(_with_capsule(fault, capsule, found), capsule)
                inherited = run.beside_reference(graph, step)
                if late.healthy and not inherited.passed:
                    late = replace(
                        late,
                        part=part.name,
                        layer=graph.layer,
                        step=step.label,
                        operators=len(operators.nodes),
                        inherited=inherited,
                        unexplained="Every value follows from the device's own before it, so no "
                        "operator is to blame: its precision is too low for this model, or it "
                        "was fed other inputs.",
                    )
    if late.healthy:
        said = f"The largest error of a value: {largest.tensor}, {describe_error(largest)}."
        late = replace(late, local=largest, notes=(said,))
    return note_capsule(late, capsule)


def _parts(dump: Dump) -> set[str]:
    return {name.part for _, name in dump.tensors if name.direction == "out"}


class _Run:
    """A part in both dumps."""

    def __init__(
        self, part: ExportedPart, reference: Dump, device: Dump, limits: Tolerances
    ) -> None:
        self.part = part
        self.reference = PartSource(reference, part.name)
        self.device = PartSource(device, part.name)
        labels = {step.label for step in self.device.steps()}
        #: The steps that both have.
        self.steps = [step for step in self.reference.steps() if step.label in labels]
        if not self.steps:
            raise DumpError(f"the dumps have no step of the {part.name} part in common")
        known = {spec.name for spec in part.outputs}
        taps = [n for step in self.steps for n in self.device.names(step, "out") if n not in known]
        if taps:
            raise DumpError(
                f"{device.folder} has {taps[0]}, which the export's {part.name} part does not give",
                "Name the export that the device ran, or export it again with the same --taps.",
            )
        noted = device.provenance.get("device")
        self._carries = isinstance(noted, dict) and noted.get("cache") == "device"
        self._limits = limits
        #: What the layers gave that have run: by step, name → array.
        self._given: dict[str, dict[str, Array]] = {step.label: {} for step in self.steps}

    def measured(self, source: PartSource, step: StepInfo, graph: LayerGraph) -> dict[str, Array]:
        """A layer's outputs in a dump."""
        names = set(source.names(step, "out"))
        wanted = [spec.name for spec in graph.outputs if spec.name in names]
        return {name: source.array(step, "out", name) for name in wanted}

    def on_device(
        self, graph: LayerGraph, step: StepInfo, plain: PlainRuntime
    ) -> tuple[Operators, dict[str, Array]]:
        """A layer on the device's values, and these."""
        measured = self.measured(self.device, step, graph)
        feeds = {spec.name: self._feed(spec.name, step) for spec in graph.inputs}
        operators = Operators(graph, feeds, plain, measured)
        read_later = (TAP, PRESENT) if self._carries else (TAP,)
        results = operators.results(operators.values)
        self._given[step.label] |= {n: a for n, a in results.items() if n.startswith(read_later)}
        return operators, measured

    def follows_in_reference(self, found: _Found, plain: PlainRuntime) -> bool:
        """Whether the reference's own value follows from the export's operators."""
        step, graph, name = found.step, found.graph, found.name
        measured = self.measured(self.reference, step, graph)
        if name not in measured:
            return True
        taps = set(self.reference.names(step, "out"))
        feeds = {
            spec.name: self.reference.array(step, "out", spec.name)
            if spec.name in taps
            else self._feed(spec.name, step)
            for spec in graph.inputs
        }
        computed = Operators(graph, feeds, plain, measured).computed
        limits = replace(self._limits, precision=None)
        return _error(computed[name], measured[name], name, self.part.name, step, limits).passed

    def beside_reference(self, graph: LayerGraph, step: StepInfo) -> LayerError:
        """The device's values of a layer beside the reference's."""
        expected = self.measured(self.reference, step, graph)
        actual = self.measured(self.device, step, graph)
        both = {name: array for name, array in expected.items() if name in actual}
        return compare_layer({step.label: both}, {step.label: actual}, self.part.name, self._limits)

    def _feed(self, name: str, step: StepInfo) -> Array:
        """An input of a layer: the device's own, as far as its dump says."""
        if name.startswith(TAP):
            return self._given[step.label][name]
        number = self.steps.index(step)
        if name.startswith(PAST) and self._carries and number:
            return self._given[self.steps[number - 1].label][name.replace(PAST, PRESENT, 1)]
        for source in (self.device, self.reference):
            if name in source.names(step, "in"):
                return source.array(step, "in", name)
        raise DumpError(
            f"neither dump holds the input {name} of {step.label}",
            "Record the reference with all tensors.",
        )


def _error(
    expected: Array, actual: Array, name: str, part: str, step: StepInfo, limits: Tolerances
) -> LayerError:
    return compare_layer({step.label: {name: expected}}, {step.label: {name: actual}}, part, limits)


def _first_wrong(
    operators: Operators, measured: Values, part: str, step: StepInfo, limits: Tolerances
) -> tuple[tuple[str, Array, LayerError, float] | None, LayerError]:
    """The first value that does not follow from those before it, with the worst of the others.

    Returns:
        That, or ``None``; and the largest error of a value that does.
    """
    wrong: tuple[str, Array, LayerError] | None = None
    largest = LayerError()
    others = 0.0
    for name, expected in operators.computed.items():
        error = _error(expected, measured[name], name, part, step, limits)
        if wrong is None and not error.passed and not operators.is_fixed(name):
            wrong = name, measured[name].astype(expected.dtype), error
        else:
            others = max(others, over_peak(expected, measured[name].astype(expected.dtype)))
            largest = max(largest, error, key=lambda error: error.over_peak)
    return (*wrong, others) if wrong is not None else None, largest


@dataclass(frozen=True)
class _Found:
    """A value of a device that does not follow from those before it.

    Attributes:
        part: Where it is.
        graph: Its layer.
        step: Its step.
        operators: The layer on the device's values.
        name: Of the value.
        actual: The value.
        error: How far it is off.
        others: How far the layer's other values are off, at most, over their peaks.
    """

    part: ExportedPart
    graph: LayerGraph
    step: StepInfo
    operators: Operators
    name: str
    actual: Array
    error: LayerError
    others: float

    @cached_property
    def exact(self) -> Operators:
        """The layer on the device's values before the wrong one, and exact from there on."""
        computed = {self.name: self.operators.computed[self.name]}
        return self.operators.with_values(self.operators.run_on(computed, without=self.numbers))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The operators between it and the device's values before it."""
        made = {
            str(value.name): number
            for number, node in enumerate(self.operators.nodes)
            for value in node.outputs
        }
        known = {spec.name for spec in self.graph.inputs} | set(self.operators.computed)
        return operators_between(self.operators, known - {self.name}, made, made[self.name])

    def fault(self, blank: Fault, precision: str | None) -> Fault:
        """The fault, with the cause where there are few enough operators to name."""
        numbers, actual = self.numbers, {self.name: self.actual}
        fault = replace(
            blank,
            part=self.part.name,
            layer=self.graph.layer,
            step=self.step.label,
            operators=len(self.operators.nodes),
            local=self.error,
            whole=self.error.over_peak,
        )
        if len(numbers) > _MOST_NAMED:
            return replace(
                fault,
                unexplained=f"The dump has no value between {self.error.tensor} and what it "
                f"follows from, {counted(len(numbers), 'operator')} before: none of these can be "
                "named. Record both with more taps, such as --taps layers,norms,q,k,v,o,mlp.",
            )
        exact, alike = self.exact, self.actual.shape == self.exact.values[self.name].shape
        spread = exact.results(exact.run_on(actual, without=numbers)) if alike else actual
        cause = Cause(
            tuple(describe_operator(exact, number, precision, None) for number in numbers),
            distance(exact.results(exact.values), spread) if alike else self.error.over_peak,
            self.others,
            RUNS,
            worst_element(exact, actual),
            around=neighbourhood(exact, numbers, actual) if alike else (),
        )
        return replace(fault, causes=(cause,))


def _with_capsule(fault: Fault, path: Path | None, found: _Found) -> Fault:
    if path is None or not fault.causes:
        return fault
    exact = found.exact
    group = exact.group(found.numbers)
    inputs = {new: np.asarray(exact.values[old]) for new, old in group.inputs.items()}
    expected = {new: exact.values[old] for new, old in group.outputs.items()}
    actual = {n: found.actual if old == found.name else expected[n]
              for n, old in group.outputs.items()}  # fmt: skip
    if any(array.shape != expected[name].shape for name, array in actual.items()):
        note = "No capsule was written: the device's value has another shape."
        return replace(fault, notes=(note,))
    facts = {"source": fault.source, "where": fault.where, "step": fault.step}
    pack(path, group, inputs, expected, actual, {**facts, "backend": fault.backend})
    return replace(fault, capsule=path)
