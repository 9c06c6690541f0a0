"""One part in a reference's dump and a device's: the values of its layers, as far as they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.compare.tolerances import Tolerances
from qeff_proxy.device.part_source import PartSource
from qeff_proxy.dump import Dump, StepInfo
from qeff_proxy.errors import DumpError
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.isolate.operators import Operators, PlainRuntime
from qeff_proxy.tensor_names import PAST, PRESENT, TAP
from qeff_proxy.verify.by_layer.results import LayerError, compare_layer


class PartDumps:
    """A part in both dumps.

    Args:
        part: The part.
        reference: The dump that the device was fed from.
        device: Its dump.
        limits: How far a value may be off.

    Raises:
        DumpError: The dumps have no step of it in common, or are not of this export.
    """

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

    def follows_in_reference(
        self, graph: LayerGraph, step: StepInfo, name: str, plain: PlainRuntime
    ) -> bool:
        """Whether the reference's own value follows from the export's operators."""
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
        return error_of(computed[name], measured[name], name, self.part.name, step, limits).passed

    def beside_reference(self, graph: LayerGraph, step: StepInfo) -> LayerError:
        """The device's values of a layer beside the reference's."""
        expected = self.measured(self.reference, step, graph)
        actual = self.measured(self.device, step, graph)
        both = {name: array for name, array in expected.items() if name in actual}
        return compare_layer({step.label: both}, {step.label: actual}, self.part.name, self._limits)

    def go_on(
        self, graphs: list[LayerGraph], known: Mapping[str, Array], step: StepInfo
    ) -> dict[str, Array]:
        """What layers give on values that are known, and else on the device's."""
        found = dict(known)
        for graph in graphs:
            names = [spec.name for spec in graph.inputs]
            feeds = {n: found[n] if n in found else self._feed(n, step) for n in names}
            operators = Operators(graph, feeds)
            found |= operators.results(operators.values)
        return found

    def read_from(
        self, before: PartDumps, known: Mapping[str, Array], step: StepInfo
    ) -> dict[str, Array] | None:
        """The inputs that this part takes from one before it: all positions, or the last ones.

        Returns:
            ``None`` where the reference does not show that it takes any.
        """
        taken = {}
        if step.label not in {one.label for one in self.steps}:
            return None
        given, read = before.reference.names(step, "out"), self.reference.names(step, "in")
        for name in [spec.name for spec in self.part.inputs if spec.name in read]:
            if name in known and name in given:
                whole = before.reference.array(step, "out", name)
                part = self.reference.array(step, "in", name)
                cut = slice(-part.shape[1], None) if part.ndim > 1 else slice(None)
                if np.array_equal(whole[:, cut], part):
                    taken[name] = known[name][:, cut]
        return taken or None

    def last_outputs(self, step: StepInfo) -> dict[str, Array]:
        """The reference's outputs of the part, without taps and caches."""
        own = [s.name for s in self.part.outputs if not s.name.startswith((TAP, PRESENT))]
        names = self.reference.names(step, "out")
        return {name: self.reference.array(step, "out", name) for name in own if name in names}

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


def error_of(
    expected: Array, actual: Array, name: str, part: str, step: StepInfo, limits: Tolerances
) -> LayerError:
    """How far one value of a step is off."""
    return compare_layer({step.label: {name: expected}}, {step.label: {name: actual}}, part, limits)
