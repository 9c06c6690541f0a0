"""Split the graph of a part with layer taps into one small graph per layer.

A tap ``hidden_states.<k>`` is the output of layer k. A layer's graph takes the taps before it and
those inputs of the part that it uses (masks, positions, its own cache), and outputs its tap and its
own cache. What comes before the first layer is in the graph of layer 0; what comes after the last
has a graph of its own. All graphs point into the weights file of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.tensor_names import PAST_INPUTS

_TAP = re.compile(r"hidden_states\.(\d+)")
_NO_SUM = re.compile(r"[^\w\s+]")


@dataclass(frozen=True)
class LayerGraph:
    """The graph of one layer.

    Attributes:
        layer: Counted from 0; ``None`` for what comes after the last layer.
        model: The graph; its weights are where those of the whole are.
        inputs: Its inputs; the output of the layer before is the first.
        outputs: Its outputs, in the order of the part's.
    """

    layer: int | None
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def split_layers(
    model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> list[LayerGraph]:
    """Split the graph of a part; run in sequence, the pieces compute the same.

    Args:
        model: The graph of the part; layers whose tap is a copy are made to read the tap.
        inputs: Its inputs, with the names of their axes.
        outputs: Its outputs, layer taps among them.

    Returns:
        The layers' graphs, in order, then that of what follows, if anything does. A graph without
        taps is returned whole, as what follows no layer.

    Raises:
        UnsupportedModelError: The layers need more than the tap of the one before.
    """
    values = {str(value.name): value for value in (*model.graph.inputs, *model.graph.outputs)}
    taps = sorted(
        (spec for spec in outputs if _TAP.fullmatch(spec.name)),
        key=lambda spec: int(spec.name.rpartition(".")[2]),
    )
    if taps and any(spec.name.endswith(PAST_INPUTS) for spec in inputs):
        raise UnsupportedModelError(
            "no layer can be run alone: the model keeps no cache that can be used, and its layers "
            "run over all positions at each step",
            "Verify the whole model; its taps (--taps layers) show where two runs first differ.",
        )
    _read_taps(model.graph, [values[tap.name] for tap in taps])
    stages = _stages([values[spec.name] for spec in outputs], [values[tap.name] for tap in taps])
    # Of an input's axes, only sums can be solved for their names: "samples//10" needs its own name.
    terms = dict.fromkeys(axis for tap in taps for axis in tap.shape if _NO_SUM.search(str(axis)))
    names = {axis: f"size_{number}" for number, axis in enumerate(terms)}
    read = [replace(tap, shape=tuple(names.get(one, one) for one in tap.shape)) for tap in taps]
    graphs = []
    for stage in range(len(taps) + 1):
        own = tuple(spec for spec in outputs if stages[spec.name] == stage)
        if own:
            layer = int(taps[stage].name.rpartition(".")[2]) if stage < len(taps) else None
            # The output of the layer before comes first: it has the axes of the part's first input.
            specs = (*reversed(read[:stage]), *inputs)
            graphs.append(_extract(model, layer, specs, own))
    return graphs


def _read_taps(graph: ir.Graph, taps: Sequence[ir.Value]) -> None:
    """Let all that reads a layer's output read its tap, where that is a copy of it."""
    changed = False
    for tap in taps:
        copy = tap.producer()
        if copy is None or copy.op_type != "Identity" or copy.inputs[0] is None:
            continue
        for node, index in list(copy.inputs[0].uses()):
            if node is not copy:
                node.replace_input_with(index, tap)
                changed = True
    if changed:
        graph.sort()


def _stages(outputs: Sequence[ir.Value], taps: Sequence[ir.Value]) -> dict[str, int]:
    """The number of the piece that computes each output: that after the last tap it depends on."""
    numbers = {tap: number for number, tap in enumerate(taps)}
    after: dict[ir.Value, int] = {tap: number + 1 for tap, number in numbers.items()}
    for node in outputs[0].graph or ():
        stage = max((after.get(value, 0) for value in read_by(node)), default=0)
        for value in node.outputs:
            after.setdefault(value, stage)
    return {str(one.name): numbers.get(one, after.get(one, 0)) for one in outputs}


def read_by(node: ir.Node) -> list[ir.Value]:
    """The values that a node reads, in its subgraphs too."""
    values = list(node.inputs)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = ir.traversal.RecursiveGraphIterator(attribute.as_graph())
            values += [value for one in inner for value in one.inputs]
    return [value for value in values if value is not None]


def _extract(
    model: ir.Model,
    layer: int | None,
    inputs: Sequence[TensorSpec],
    outputs: tuple[TensorSpec, ...],
) -> LayerGraph:
    graph = ir.convenience.extract(
        model.graph, [spec.name for spec in inputs], [spec.name for spec in outputs]
    )
    specs = {spec.name: spec for spec in inputs}
    _take_shapes_from_own_inputs(graph, specs)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    piece = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    used = tuple(specs[str(value.name)] for value in graph.inputs)
    return LayerGraph(layer, piece, used, outputs)


def _take_shapes_from_own_inputs(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> None:
    """Let sizes that are read from inputs of other layers be read from this layer's own.

    The trace reads sizes from the first tensor that has them, such as the embeddings, or the cache
    of layer 0.
    """

    def only_shape(value: ir.Value) -> bool:
        return all(node.op_type == "Shape" for node, _ in value.uses())

    own = [value for value in graph.inputs if not only_shape(value)]
    for value in [value for value in graph.inputs if only_shape(value)]:
        for node, _ in list(value.uses()):
            axes = _axes(node, specs[str(value.name)])
            stand_in = next((one for one in own if _axes(node, specs[str(one.name)]) == axes), None)
            if stand_in is not None:
                node.replace_input_with(0, stand_in)


def _axes(node: ir.Node, spec: TensorSpec) -> tuple[int | str, ...]:
    """The axes of an input that a ``Shape`` node gives."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return spec.shape[start.as_int() if start else None : end.as_int() if end else None]
