"""A layer on a backend, with some of its operators exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.isolate.blame import OpenGroup, Trials
from qeff_proxy.isolate.operators import Operators, PlainRuntime
from qeff_proxy.session.session import Session
from qeff_proxy.verify.by_layer.candidate import Candidate, OpenLayer


def without(candidate: Candidate, numbers: set[int]) -> OpenLayer:
    """Opens a layer with some operators exact, and all others on the backend."""

    @contextmanager
    def opened(part: ExportedPart, graph: LayerGraph) -> Iterator[_Exact]:
        yield _Exact(part, graph, candidate, numbers)

    return opened


class _Exact(Session):
    """A layer with some operators exact."""

    def __init__(
        self, part: ExportedPart, graph: LayerGraph, candidate: Candidate, numbers: set[int]
    ) -> None:
        super().__init__(replace(part, inputs=graph.inputs, outputs=graph.outputs))
        self._graph = graph
        self._numbers = numbers
        self._plain = PlainRuntime(graph.model)
        self._open: OpenGroup = lambda group: candidate.session(part, group.graph)

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        """Run it; see `Session.compute`."""
        operators = Operators(self._graph, feeds, self._plain)
        trials = Trials(operators, self._open)
        outputs = operators.results(trials.without(self._numbers, operators.values))
        operators.free_pages()
        return outputs
