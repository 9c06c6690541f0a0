"""Isolate where two exports of one model differ: the operator, on the first's exact values.

Both graphs run an operator at a time on the CPU, layer by layer, on the values of the first. An
operator is at fault whose outputs differ while all that it reads agrees. Values are matched by
name, as one exporter gives them; where another exporter, opset or fusion gives others, the
operators between matched values are a group. Between graphs that differ in weights alone any
difference counts, since the same kernels give the same bits; else differences above the rounding
of float32 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.common.file_errors import reading
from qeff_proxy.compare.tolerances import Tolerances
from qeff_proxy.errors import UsageError
from qeff_proxy.graph.split_layers import LayerGraph, split_layers
from qeff_proxy.graph.structure import structure_of
from qeff_proxy.isolate.blame import RUNS, distance, over_peak
from qeff_proxy.isolate.capsule import check_capsule_place, pack
from qeff_proxy.isolate.describe import describe_operator, worst_element
from qeff_proxy.isolate.neighbourhood import neighbourhood
from qeff_proxy.isolate.operators import Operators, PlainRuntime, Values, names_read
from qeff_proxy.isolate.results import Cause, Fault, format_share, note_capsule
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer.calls import (
    Call,
    Outputs,
    calls_of,
    calls_on_ids,
    job_of,
    plain_ids,
)
from qeff_proxy.verify.by_layer.part_run import PartRun, Step
from qeff_proxy.verify.by_layer.results import compare_layer, layer_name
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.runs import check_request, complete_request, processor_in
from qeff_proxy.verify.verify_model import installed_hooks, live_proxy

#: Between graphs of other structure, a difference over the peak that is more than rounding.
_ROUNDING = 1e-5
_BLOCK = 1 << 20


def isolate_between(
    first: Export,
    second: Export,
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    capsule: Path | None = None,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Fault:
    """Find the first operator in which two exports of one model differ.

    Args:
        first: The reference.
        second: The other. With layer taps in both, a layer at a time is in memory.
        request: The input; by default the flow's example, of a decoder random tokens.
        options: Its ``max_new_tokens``, ``continuation`` and ``compile`` are used.
        capsule: Write the operator to this file, with the second's weights.
        hooks: Of the model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: They are not exports of one model, or the input cannot be right.
    """
    options = options or VerifyOptions()
    if capsule is not None:
        check_capsule_place(capsule)
    _check_alike(first, second)
    calls = _calls(first, request, options, hooks, trust_remote_code)
    known: dict[str, Outputs] = {}
    largest = 0.0, "any value"
    for part, other in zip(first.parts, second.parts, strict=True):
        run = PartRun(part, calls(part.name, known))
        graphs, others = _layers(first, part), _layers(second, other)
        if [g.layer for g in graphs] != [g.layer for g in others]:
            raise UsageError(
                f"the {part.name} parts have other layer taps",
                "Export both with the same --taps, or both without.",
            )
        for number, (graph, twin) in enumerate(zip(graphs, others, strict=True)):
            progress(layer_name(part.name, graph.layer))
            pair = _Pair(graph, twin)
            outputs: list[Step] = []
            for call in range(len(run.calls)):
                feeds = run.feeds(graph, call, outputs)
                operators = pair.first(feeds)
                outputs.append(operators.results(operators.values))
                if pair.equal:
                    continue
                found = pair.compare(operators, feeds)
                if found is not None:
                    step = run.calls[call].step
                    fault = _fault(first, second, part, step, pair, found)
                    return _with_capsule(fault, capsule, found)
            largest = max(largest, pair.largest)
            run.keep(outputs, graphs[number + 1 :])
            del operators
            pair.close()
        known[part.name] = run.outputs()
    share, name = largest
    limit = f"(limit {format_share(_ROUNDING)})"
    said = f"The largest difference: {format_share(share)} of the peak, in {name} {limit}."
    said = said if share else "All values are the same."
    fault = Fault(str(first.folder), str(second.folder), exports=True, notes=(said,))
    return note_capsule(fault, capsule)


def _calls(
    export: Export,
    request: Request | None,
    options: VerifyOptions,
    hooks: Hooks | None,
    trust_remote_code: bool,
) -> Callable[[str, Mapping[str, Outputs]], list[Call]]:
    """How to learn the calls of a part, from those before it; of token ids without PyTorch."""
    ids = plain_ids(export, request, options)
    if ids is not None:
        new = options.max_new_tokens
        return lambda part, known: calls_on_ids(export, part, known, ids, new)
    hooks = hooks or installed_hooks(export)
    request, tensors = check_request(request, export, hooks, trust_remote_code)
    live = partial(live_proxy, None, hooks, export)
    processor = processor_in(export.processor_folder, trust_remote_code)
    _, tensors = complete_request(export, request, tensors, hooks, processor, live)
    return lambda part, known: calls_of(job_of(export, options, tensors), part, known)


def _check_alike(first: Export, second: Export) -> None:
    types = [export.model["model_type"] for export in (first, second)]
    if types[0] != types[1]:
        raise UsageError(
            f"the exports are of other models: {types[0]} and {types[1]}",
            "Name two exports of one model.",
        )
    for part, twin in zip(first.parts, second.parts, strict=False):
        ours = {spec.name: spec for spec in (*part.inputs, *part.outputs)}
        for spec in (*twin.inputs, *twin.outputs):
            same = ours.get(spec.name, spec)
            sizes = zip(same.shape, spec.shape, strict=False)
            other = any(a != b for a, b in sizes if isinstance(a, int) and isinstance(b, int))
            if other or same.dtype != spec.dtype or len(same.shape) != len(spec.shape):
                raise UsageError(
                    f"{spec.name} of the {part.name} part is {same.dtype} {list(same.shape)} in "
                    f"one export and {spec.dtype} {list(spec.shape)} in the other",
                    "Name two exports of one model.",
                )
    shapes = [
        [(p.name, {i.name for i in p.inputs}, {o.name for o in p.outputs}) for p in export.parts]
        for export in (first, second)
    ]
    if shapes[0] != shapes[1]:
        for one, two in zip(*shapes, strict=False):
            if one[0] == two[0] and one != two:
                differ = sorted((one[1] ^ two[1]) | (one[2] ^ two[2]))
                raise UsageError(
                    f"{differ[0]} of the {one[0]} part is in one of the exports only",
                    "Export both from one model, in one way and with the same --taps.",
                )
        raise UsageError("the exports have other parts", "Export both with the same --proxy.")
    if first.dtype != second.dtype:
        raise UsageError(f"one export is {first.dtype}, the other {second.dtype}")


def _layers(export: Export, part: ExportedPart) -> list[LayerGraph]:
    with reading(export.folder):
        whole = ir.load(export.folder / part.file)
    return split_layers(whole, part.inputs, part.outputs)


@dataclass(frozen=True)
class _Difference:
    """Operators of the second graph whose outputs differ while all that they read agrees."""

    operators: Operators
    first: Operators
    numbers: tuple[int, ...]
    actual: Mapping[str, Array]

    @property
    def values(self) -> Values:
        """The first's values."""
        return self.first.values

    @property
    def exact(self) -> Operators:
        """The second's operators and weights, with the first's values."""
        own = self.operators
        values = {name: value for name, value in self.values.items() if not own.is_fixed(name)}
        return own.with_values({**own.values, **values})


class _Pair:
    """A layer of both exports."""

    def __init__(self, graph: LayerGraph, twin: LayerGraph) -> None:
        self._graphs = graph, twin
        self._plain = PlainRuntime(graph.model), PlainRuntime(twin.model)
        self.layer = graph.layer
        alike = structure_of(graph.model) == structure_of(twin.model)
        self.equal = alike and _equal_weights(graph.model, twin.model)
        self._limit = 0.0 if alike else _ROUNDING
        #: Of the values that agree, the largest difference over the peak, and the value.
        self.largest = 0.0, "any value"

    def close(self) -> None:
        """Let go of the mapped weights; whoever holds an array of them keeps its file open."""
        for graph in self._graphs:
            for value in graph.model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    with suppress(BufferError):
                        value.const_value.release()

    def first(self, feeds: Values) -> Operators:
        """The first's layer on its inputs."""
        return Operators(self._graphs[0], feeds, self._plain[0])

    def compare(self, operators: Operators, feeds: Values) -> _Difference | None:
        """The first difference of the second's layer on the same inputs; ``None`` for none."""
        twin = Operators(self._graphs[1], feeds, self._plain[1])
        agree = set(feeds)
        made: dict[str, int] = {}
        for number, node in enumerate(twin.nodes):
            outputs = [str(value.name) for value in node.outputs if value.name]
            made |= dict.fromkeys(outputs, number)
            for name in outputs:
                if name not in operators.values or operators.is_fixed(name):
                    continue
                expected, actual = operators.values[name], twin.values[name]
                share = over_peak(expected, actual)
                if share <= self._limit:
                    agree.add(name)
                    self.largest = max(self.largest, (share, name))
                elif expected.shape == actual.shape or name in operators.outputs:
                    numbers = operators_between(twin, agree, made, number)
                    exact = {name: value for name, value in operators.values.items()
                             if name in agree}  # fmt: skip
                    alone = twin.run_these(numbers, {**twin.values, **exact})
                    return _Difference(
                        twin,
                        operators,
                        numbers,
                        {out: alone[out] for out in outputs if out in operators.values},
                    )
        return None


def operators_between(
    twin: Operators, agree: set[str], made: Mapping[str, int], last: int
) -> tuple[int, ...]:
    """The operators between values that agree and one that does not.

    Args:
        twin: The layer's operators.
        agree: The names of the values that agree.
        made: Which operator makes a value.
        last: The one that makes the value that does not.
    """
    chosen = {last}
    waiting = [last]
    while waiting:
        for name in names_read(twin.nodes[waiting.pop()]):
            number = made.get(name)
            if number is not None and name not in agree and number not in chosen:
                chosen.add(number)
                waiting.append(number)
    return tuple(sorted(chosen))


def _equal_weights(first: ir.Model, second: ir.Model) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(_equal(one, two) for one, two in pairs)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The weights, in the order in which operators read them."""
    seen: dict[str, ir.TensorProtocol] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                seen.setdefault(str(value.name), value.const_value)
    return iter(seen.values())


def _equal(one: ir.TensorProtocol, two: ir.TensorProtocol) -> bool:
    """Whether two tensors have the same bits; read in blocks, so that they take no memory."""
    if not isinstance(one, ir.ExternalTensor) or not isinstance(two, ir.ExternalTensor):
        return one.tobytes() == two.tobytes()
    with Path(one.path).open("rb") as first, Path(two.path).open("rb") as second:
        first.seek(one.offset or 0)
        second.seek(two.offset or 0)
        left = one.nbytes
        while left > 0:
            size = min(left, _BLOCK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _fault(
    first: Export,
    second: Export,
    part: ExportedPart,
    step: str,
    pair: _Pair,
    found: _Difference,
) -> Fault:
    twin, reference = found.operators, found.values
    changed = {out: reference[out] for out in found.actual}
    expected = {out: reference[out] for out in twin.outputs}
    error = distance(expected, found.first.run_on(found.actual))
    remaining = distance(expected, twin.run_on(changed, without=found.numbers))
    whole = distance(expected, twin.values)
    exact = found.exact
    cause = Cause(
        tuple(describe_operator(exact, number, None, None) for number in found.numbers),
        error,
        remaining,
        RUNS,
        worst_element(exact, found.actual),
        around=neighbourhood(exact, found.numbers, found.actual),
    )
    local = compare_layer(
        {step: expected},
        {step: twin.results(twin.values)},
        part.name,
        Tolerances(),
    )
    return Fault(
        str(first.folder),
        str(second.folder),
        part.name,
        pair.layer,
        step,
        len(twin.nodes),
        replace(local, passed=False),
        whole=whole,
        causes=(cause,),
        exports=True,
    )


def _with_capsule(fault: Fault, path: Path | None, found: _Difference) -> Fault:
    if path is None:
        return fault
    exact = found.exact
    group = exact.group(found.numbers)
    inputs = {new: np.asarray(exact.values[old]) for new, old in group.inputs.items()}
    computed = found.operators.run_these(found.numbers, exact.values)
    actual = {new: computed[old] for new, old in group.outputs.items()}
    expected = {
        new: found.values.get(old, actual[new])  # what the first has no name for is not compared
        for new, old in group.outputs.items()
    }
    facts = {"source": fault.source, "where": fault.where, "step": fault.step}
    facts["backend"] = fault.backend
    pack(path, group, inputs, expected, actual, facts)
    return replace(fault, capsule=path)
