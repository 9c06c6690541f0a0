"""Run variants of a model, which differ in what of it is in a lower precision, side by side.

A variant is the set of its low units; all else is float32. All variants that reach a layer go
through it together, as rows of one batch, so one layer is in memory at a time. Variants that are
alike up to a layer are one row up to there. Every variant's last outputs are compared with those of
the model in float32, and dropped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.onnxruntime.open_graph import COPYING, map_weights, open_graph
from qeff_proxy.backends.recipe import name_units_of
from qeff_proxy.common.file_errors import reading
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.flows.flow import Job
from qeff_proxy.graph.modules import kind_of, layer_in, unit_of, weights_of
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.precision.distance import Distance, distance_of
from qeff_proxy.precision.ranges import Range, depends_on, range_of
from qeff_proxy.precision.simulate import Simulation
from qeff_proxy.verify.by_layer.calls import Call, Outputs, calls_of, check_alone
from qeff_proxy.verify.by_layer.part_run import PartRun, Step

#: Bytes of values that are in memory at once, and how many times its outputs a layer holds inside.
_AT_ONCE, _INSIDE = 1 << 26, 12


@dataclass(frozen=True)
class Unit:
    """The smallest thing that a precision is chosen for (`qeff_proxy.graph.modules`).

    Attributes:
        name: Its module path, with an operator's type where the module has others in it.
        part: The part that it is in.
        layer: The path of its layer; ``None`` outside of layers.
        kind: What it is called in each layer.
        weights: Elements of its weights.
    """

    name: str
    part: str
    layer: str | None
    kind: str
    weights: int


#: Gets the values of all tensors of a layer in float32: part, graph, name → range.
Observer = Callable[[ExportedPart, LayerGraph, Mapping[str, Range]], None]


class Variants:
    """Runs variants of an export.

    Args:
        export: With layer taps, or it runs in one piece.
        simulation: What low units compute in.
        job: The input; see `qeff_proxy.verify.by_layer.calls.job_of`.
        progress: Called with the name of each stage as it starts.
    """

    def __init__(
        self, export: Export, simulation: Simulation, job: Job, progress: Callable[[str], None]
    ) -> None:
        self.export, self.simulation = export, simulation
        self._job, self._progress = job, progress
        self._ranges: dict[tuple[str, str], Mapping[str, Range]] = {}  # in float32, of each layer
        #: The units that the precision changes; and the elements of all weights in their parts.
        self.units: dict[str, Unit] = {}
        self.weights = 0
        for part in export.parts:
            self._add_units(part)

    def _add_units(self, part: ExportedPart) -> None:
        model = self._load(part)
        inputs = self._active(part, part.inputs)
        affected = self.simulation.affected(part, model, inputs)
        sizes: dict[str, int] = {}
        owned: dict[str, dict[str, int]] = {}
        for node in model.graph:
            unit = unit_of(node)
            if unit is None:
                continue
            for weight in weights_of(node):
                size = int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
                owned.setdefault(unit, {})[str(weight.name)] = sizes[str(weight.name)] = size
            if unit in affected and unit not in self.units:
                self.units[unit] = Unit(unit, part.name, layer_in(unit), kind_of(unit), 0)
        for unit, weights in owned.items():
            if unit in affected:
                one = self.units[unit]
                self.units[unit] = Unit(
                    one.name, one.part, one.layer, one.kind, sum(weights.values())
                )
        self.weights += sum(sizes.values()) if affected else 0

    def share(self, units: Set[str]) -> float:
        """The share of the weights that some units have."""
        return sum(self.units[name].weights for name in units) / max(1, self.weights)

    def _site(self, part: ExportedPart) -> str | None:
        """The module that a part is, where it holds the vocabulary."""
        site = self.export.cut.get("sites", {}).get(part.name, {}).get("module")
        return None if site is None else str(site)

    def _load(self, part: ExportedPart) -> ir.Model:
        with reading(self.export.folder):
            model = ir.load(self.export.folder / part.file)
        name_units_of(model, self.export, part)
        return model

    def _active(self, part: ExportedPart, specs: Sequence[object]) -> set[str]:
        """The inputs that carry activations."""
        masks = {mask.name for mask in part.masks}
        every = self._site(part) is not None
        return {
            spec.name  # type: ignore[attr-defined]
            for spec in specs
            if every or (spec.dtype.startswith("float") and spec.name not in masks)  # type: ignore[attr-defined]
        }

    def measure(
        self, variants: Sequence[Set[str]], observe: Observer | None = None
    ) -> list[Distance]:
        """Run variants; how far each is from the model in float32.

        Args:
            variants: The low units of each.
            observe: Sees the values of each layer in float32.

        Raises:
            UnsupportedModelError: The model cannot be run layer by layer.
        """
        low = [frozenset(), *map(frozenset, variants)]
        at = [0] * len(low)  # of each variant, its place in `known`, and among the runs of a part
        known: list[dict[str, Outputs]] = [{}]  # the outputs of the parts before
        found: list[Distance] = []
        for number, part in enumerate(self.export.parts):
            runs = [
                PartRun(part, _whole(part, calls_of(self._job, part.name, one), one))
                for one in known
            ]
            if not runs[0].calls:
                continue
            graphs = split_layers(self._load(part), part.inputs, part.outputs)
            for stage, graph in enumerate(graphs):
                check_alone(part, graph, stage)
                self._progress(f"{part.name}, piece {stage + 1} of {len(graphs)}")
                is_last = number + 1 == len(self.export.parts) and stage + 1 == len(graphs)
                here = {unit for node in graph.model.graph if (unit := unit_of(node))}
                wanted = [(place, one & here) for place, one in zip(at, low, strict=True)]
                order = {pair: n for n, pair in enumerate(dict.fromkeys(wanted))}
                at = [order[pair] for pair in wanted]
                known = [known[place] for place, _ in order]
                following = graphs[stage + 1 :]
                done = self._stage(part, graph, runs, list(order), following, observe, is_last)
                runs = [run for run, _ in done]
                found = [distance for _, distance in done if distance is not None]
                for value in graph.model.graph.initializers.values():
                    if isinstance(value.const_value, ir.ExternalTensor):
                        value.const_value.release()  # its part of the file stays mapped otherwise
                gc.collect(1)  # graphs are cycles, which hold arrays of the layer's size
            known = [
                {**one, part.name: run.outputs()} for one, run in zip(known, runs, strict=True)
            ]
        if not found:
            raise UnsupportedModelError(
                "the last part computes nothing on this input", "Give another input."
            )
        return [found[place] for place in at[1:]]

    def _stage(
        self,
        part: ExportedPart,
        graph: LayerGraph,
        runs: Sequence[PartRun],
        pairs: Sequence[tuple[int, frozenset[str]]],
        following: Sequence[LayerGraph],
        observe: Observer | None,
        is_last: bool,
    ) -> list[tuple[PartRun, Distance | None]]:
        """Run a layer: for each pair of a run and its low units, the run that goes on."""
        ranges: Mapping[str, Range] = {}
        if observe is not None or self.simulation.calibrates:
            where = part.name, graph.outputs[0].name
            if where not in self._ranges:
                self._ranges[where] = self._observed(part, graph, runs[0])
            ranges = self._ranges[where]
        if observe is not None:
            observe(part, graph, ranges)
        results: dict[tuple[int, frozenset[str]], tuple[PartRun, Distance | None]] = {}
        expected: Sequence[Step] | None = None
        for low in dict.fromkeys(units for _, units in pairs):  # that of float32 is the first
            places = [place for place, units in pairs if units == low]
            inputs = self._active(part, graph.inputs)
            masks = {mask.name for mask in part.masks}
            model = self.simulation.lower(part.name, graph.model, low, inputs, masks, ranges)
            # ONNX Runtime's optimizer would round weights between rounded values once more.
            session = _open(model, self.export, optimize=not low)
            chosen = [runs[place] for place in places]
            for place, outputs in zip(places, _forward(session, graph, chosen), strict=True):
                distance = None
                if is_last:
                    expected = outputs if expected is None else expected
                    distance = distance_of(expected, outputs, self._job.tensors)
                run = runs[place].fork()
                if not is_last:
                    run.keep(outputs, following)
                results[place, low] = run, distance
            del session
        return [results[pair] for pair in pairs]

    def _observed(self, part: ExportedPart, graph: LayerGraph, run: PartRun) -> dict[str, Range]:
        """The ranges of the floating values of a layer in float32."""
        model = graph.model.clone()
        masks = {mask.name for mask in part.masks}
        hidden = {v.name for v in depends_on(model.graph, masks, until=("Softmax",))}
        kept = {value.name for value in model.graph.outputs}
        computed = depends_on(model.graph, [str(value.name) for value in model.graph.inputs])
        for node in model.graph:
            for value in node.outputs:  # but not weights, transposed: they may be the vocabulary
                wanted = value.dtype == ir.DataType.FLOAT and value in computed
                if wanted and value.name not in kept:
                    model.graph.outputs.append(value)
        session = _open(model, self.export, optimize=False)
        names = [value.name for value in session.get_outputs()]
        found: dict[str, Range] = {}
        past: list[Step] = []
        for number in range(len(run.calls)):
            feeds = run.feeds(graph, number, past)
            outputs = dict(zip(names, session.run(names, feeds), strict=True))
            past.append({spec.name: outputs[spec.name] for spec in graph.outputs})
            for name, array in {**feeds, **outputs}.items():
                if array.dtype == np.float32:
                    one = range_of(array, masked=name in hidden)
                    if one is not None:
                        found[name] = one.joined(found.get(name))
        return found


def _whole(part: ExportedPart, calls: list[Call], known: Mapping[str, Outputs]) -> list[Call]:
    """The calls of a part that computes position by position, on all positions and not the last."""
    if not known or len(part.inputs) != 1:
        return calls
    before, (spec,) = list(known.values())[-1], part.inputs
    if len(before) != len(calls):
        return calls
    result = []
    for call, outputs in zip(calls, before, strict=True):
        given, array = call.inputs.get(spec.name), outputs.get(spec.name)
        if given is not None and array is not None and array.shape[:1] == given.shape[:1]:
            call = Call(call.step, {spec.name: array}, call.past)
        result.append(call)
    return result


def _open(
    model: ir.Model, export: Export, *, optimize: bool = True
) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    if all(node.op_type != "MatMulNBits" for node in model.graph):
        map_weights(settings)  # of such products it would let the activations stay float32
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = (
        levels.ORT_ENABLE_EXTENDED if optimize else levels.ORT_DISABLE_ALL
    )
    proto = ir.to_proto(model).SerializeToString()
    return open_graph(proto, settings, weights=export.folder, without=COPYING)


def _forward(
    session: onnxruntime.InferenceSession, graph: LayerGraph, runs: Sequence[PartRun]
) -> Iterator[list[Step]]:
    """All calls of some runs through a layer, as rows of one batch: the outputs of each run."""
    batch = graph.outputs[0].shape[0]
    together = isinstance(batch, str) and all(batch in spec.shape for spec in graph.outputs)
    first = _rows(session, graph, runs[:1], batch)
    yield from first
    size = sum(array.nbytes for step in first[0] for array in step.values()) * _INSIDE
    most = max(1, _AT_ONCE // max(1, size)) if together else 1
    for begin in range(1, len(runs), most):
        yield from _rows(session, graph, runs[begin : begin + most], batch)


def _rows(
    session: onnxruntime.InferenceSession,
    graph: LayerGraph,
    runs: Sequence[PartRun],
    batch: int | str,
) -> list[list[Step]]:
    outputs: list[list[Step]] = [[] for _ in runs]
    names = [spec.name for spec in graph.outputs]
    inputs = {value.name for value in session.get_inputs()}
    for number in range(len(runs[0].calls)):
        feeds = [run.feeds(graph, number, past) for run, past in zip(runs, outputs, strict=True)]
        joined: dict[str, Array] = {}
        for spec in graph.inputs:
            arrays = [one[spec.name] for one in feeds]
            alone = len(runs) == 1 or batch not in spec.shape
            joined[spec.name] = (
                arrays[0] if alone else np.concatenate(arrays, spec.shape.index(batch))
            )
        found = session.run(names, {n: a for n, a in joined.items() if n in inputs})
        for spec, array in zip(graph.outputs, found, strict=True):
            pieces = (
                [array] if len(runs) == 1 else np.split(array, len(runs), spec.shape.index(batch))
            )
            for past, piece in zip(outputs, pieces, strict=True):
                if len(past) == number:
                    past.append({})
                past[number][spec.name] = piece if len(runs) == 1 else piece.copy()
    return outputs
