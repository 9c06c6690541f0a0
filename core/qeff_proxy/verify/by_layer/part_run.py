"""The calls of a part, run layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.tensor_names import PAST, PRESENT, TAP
from qeff_proxy.verify.by_layer.calls import Call, Outputs, zeros

#: Tensors of one call, by name.
Step = dict[str, Array]


class PartRun:
    """The values of a part's calls, as far as the layers have run.

    Args:
        part: The part.
        calls: Its calls.
    """

    def __init__(self, part: ExportedPart, calls: Sequence[Call]) -> None:
        self.part = part
        self.calls = calls
        self._values: list[Step] = [dict(call.inputs) for call in calls]

    def fork(self) -> PartRun:
        """A second run with the same values so far, which goes on by itself."""
        other = PartRun(self.part, self.calls)
        vars(other).update(_values=[dict(values) for values in self._values])
        return other

    def forward(
        self,
        graph: LayerGraph,
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        *,
        cache: Sequence[Step] | None = None,
        whole: bool = False,
    ) -> list[Step]:
        """All calls through one layer.

        Args:
            graph: The layer.
            run: Runs it on its inputs.
            cache: The outputs that each call's past is taken from; by default those of this run.
            whole: ``run`` takes all inputs of the part; the caches of other layers are zeros.

        Returns:
            The layer's outputs in each call.
        """
        outputs: list[Step] = []
        past = outputs if cache is None else cache
        for number in range(len(self.calls)):
            results = run(self.feeds(graph, number, past, whole=whole))
            outputs.append({spec.name: results[spec.name] for spec in graph.outputs})
        return outputs

    def feeds(
        self, graph: LayerGraph, number: int, past: Sequence[Step], *, whole: bool = False
    ) -> Step:
        """A layer's inputs in one call.

        Args:
            graph: The layer.
            number: Of the call.
            past: The layer's outputs in the calls before it.
            whole: Give all inputs of the part; the caches of other layers are zeros.
        """
        call, values = self.calls[number], self._values[number]
        feeds: Step = {}
        if whole:
            dtypes = {spec.name: spec.dtype for spec in self.part.inputs}
            feeds = {name: zeros(shape, dtypes[name]) for name, shape in call.past.items()}
            feeds = {**call.inputs, **feeds}
        for spec in graph.inputs:
            if spec.name.startswith(PAST):
                feeds[spec.name] = call.cache(spec, past[number - 1] if number else None)
            else:
                feeds[spec.name] = values[spec.name]
        return feeds

    def keep(self, outputs: Sequence[Step], following: Sequence[LayerGraph]) -> list[Step]:
        """Keep what later layers or parts take of a layer's outputs, and drop what none takes.

        Returns:
            What of the outputs was kept, in each call.
        """
        needed = {spec.name for graph in following for spec in graph.inputs}
        for values, layer in zip(self._values, outputs, strict=True):
            values.update(layer)
            for name in list(values):
                if name.startswith((PRESENT, TAP)) and name not in needed:
                    del values[name]
        return [
            {name: array for name, array in layer.items() if name in values}
            for values, layer in zip(self._values, outputs, strict=True)
        ]

    def by_step(self, outputs: Sequence[Step]) -> dict[str, Step]:
        """The outputs of a layer in each call, by the call's step."""
        return dict(zip((call.step for call in self.calls), outputs, strict=True))

    def outputs(self) -> Outputs:
        """The outputs of the part in each call, without caches and taps."""
        names = {spec.name for spec in self.part.outputs}
        return [{n: a for n, a in values.items() if n in names} for values in self._values]
