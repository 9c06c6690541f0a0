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
from qeff_proxy.dump import Dump, StepInfo
from qeff_proxy.errors import DumpError
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.isolate.between_exports import operators_between
from qeff_proxy.isolate.blame import RUNS, distance, over_peak
from qeff_proxy.isolate.capsule import check_capsule_place, pack
from qeff_proxy.isolate.describe import describe_operator, worst_element
from qeff_proxy.isolate.neighbourhood import neighbourhood
from qeff_proxy.isolate.operators import Operators, PlainRuntime, Values
from qeff_proxy.isolate.part_dumps import PartDumps, error_of
from qeff_proxy.isolate.results import Cause, Fault, describe_error, note_capsule
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
        run = PartDumps(part, reference, device, limits)
        graphs = _graphs(export, part)
        for number, graph in enumerate(graphs):
            progress(layer_name(part.name, graph.layer))
            plain = PlainRuntime(graph.model)
            for step in run.steps:
                operators, measured = run.on_device(graph, step, plain)
                wrong, most = _first_wrong(operators, measured, part.name, step, limits)
                largest = max(largest, most, key=lambda error: error.over_peak)
                if wrong is not None:
                    found = _Found(part, graph, step, operators, *wrong)
                    fault = found.fault(blank, precision)
                    if not run.follows_in_reference(graph, step, found.name, plain):
                        fault = replace(
                            fault,
                            causes=(),
                            unexplained=f"The reference's own {found.name} does not follow from "
                            "this export's operators either: name the export that it ran.",
                        )
                    elif fault.causes:
                        progress("with the cause exact")
                        later = [
                            PartDumps(one, reference, reference, limits)
                            for one in export.parts[export.parts.index(part) + 1 :]
                            if one.name in _parts(reference)
                        ]
                        fault = _proved(fault, found, run, graphs[number + 1 :], later, export)
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
                        unexplained="Each value is within its limit of what follows from the "
                        "device's own before it, so no operator is out of line by itself.",
                    )
    said = f"The largest error of a value: {largest.tensor}, {describe_error(largest)}."
    late = replace(late, local=largest, notes=(said,))
    return note_capsule(late, capsule)


def _graphs(export: Export, part: ExportedPart) -> list[LayerGraph]:
    with reading(export.folder):
        whole = ir.load(export.folder / part.file)
    return split_layers(whole, part.inputs, part.outputs)


def _parts(dump: Dump) -> set[str]:
    return {name.part for _, name in dump.tensors if name.direction == "out"}


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
        error = error_of(expected, measured[name], name, part, step, limits)
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


def _proved(
    fault: Fault,
    found: _Found,
    run: PartDumps,
    following: list[LayerGraph],
    later: list[PartDumps],
    export: Export,
) -> Fault:
    """The fault with the error of the last outputs in its step: with the device's value, and exact.

    What comes behind the value is exact in both.
    """
    exact, step = found.exact, found.step
    if found.actual.shape != exact.values[found.name].shape:
        return replace(fault, notes=("No proof: the device's value has another shape.",))
    changed = exact.run_on({found.name: found.actual}, without=found.numbers)
    errors = []
    for values in (changed, exact.values):
        last, known = run, run.go_on(following, exact.results(values), step)
        for other in later:
            read = other.read_from(last, known, step)
            if read is not None:
                last, known = other, other.go_on(_graphs(export, other.part), read, step)
        expected = last.last_outputs(step)
        actual = {name: known[name] for name in expected}
        one, other_one = {step.label: expected}, {step.label: actual}
        errors.append(compare_layer(one, other_one, last.part.name, Tolerances()))
    if not errors[0].tensor:
        said = f"No proof: the reference holds no last output of the {last.part.name} part."
        return replace(fault, notes=(said,))
    return replace(fault, before=errors[0], after=errors[1])


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
