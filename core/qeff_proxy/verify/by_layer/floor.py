"""The noise floor of a verification by layer: the reference, rounded to a backend's precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.compare import NoiseFloor
from qeff_proxy.flows.flow import Job
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.verify.by_layer.calls import Outputs, calls_of
from qeff_proxy.verify.by_layer.part_run import PartRun, Step
from qeff_proxy.verify.by_layer.results import measure_floor
from qeff_proxy.verify.results import reason_of

#: By phase and name, the noise floor of each tensor of a layer.
Floors = Mapping[tuple[str, str], NoiseFloor]


class LayerFloor:
    """One precision, run beside the reference.

    Args:
        bits: Its significant bits.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        #: Of the layer that ran last: on the reference's inputs, and on results so rounded so far.
        self.local: Floors = {}
        self.inherited: Floors = {}
        #: What later layers take of that layer's outputs.
        self.kept: list[Step] = []
        #: Why there are no floors any more.
        self.failure: str | None = None
        self._run: PartRun | None = None
        self._known: dict[str, Outputs] = {}

    def begin(self, part: ExportedPart, job: Job) -> None:
        """Begin a part, with the outputs of the parts before it as they were rounded."""
        if self.failure is not None:
            return
        if self._run is not None:
            self._known[self._run.part.name] = self._run.outputs()
        self._run = PartRun(part, calls_of(job, part.name, self._known))

    def run_layer(
        self,
        graph: LayerGraph,
        reference: PartRun,
        expected: Mapping[str, Step],
        following: Sequence[LayerGraph],
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    ) -> None:
        """Run a layer with ``run`` and measure its floors.

        Args:
            graph: The layer.
            reference: The reference's run of the part.
            expected: The reference's outputs, by step.
            following: The layers after it.
            run: Runs the layer, rounded, on all inputs of the part.
        """
        if self.failure is not None or self._run is None:
            return
        cache = list(expected.values())
        try:
            local = reference.forward(graph, run, cache=cache, whole=True)
            inherited = self._run.forward(graph, run, whole=True)
        except Exception as error:  # noqa: BLE001 (without a floor, the fixed limits remain)
            self.failure = reason_of(error)
            self.local = self.inherited = {}
            return
        self.local, self.inherited = (
            measure_floor(expected, dict(zip(expected, outputs, strict=True)), reference.part.name)
            for outputs in (local, inherited)
        )
        self.kept = self._run.keep(inherited, following)

    def state(self) -> str | None:
        """The state after the layer that ran last, as a JSON value."""
        return self.failure

    def restore(
        self, kept: Sequence[Step], failure: str | None, following: Sequence[LayerGraph]
    ) -> None:
        """Take up a layer that an earlier run ran, instead of `run_layer`."""
        self.failure = failure
        if failure is None and self._run is not None:
            self.kept = self._run.keep(kept, following)
