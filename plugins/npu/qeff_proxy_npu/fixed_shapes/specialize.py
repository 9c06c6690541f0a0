"""Fix the shapes of a part with dynamic axes, without tracing again.

1. The exported graph is read; its weights stay in their file.
2. The named axes get their sizes.
3. Weights become graph inputs for a moment, so that nothing folds or copies them.
4. `qeff_proxy.graph.folding` infers every shape, and folds what depends on shapes and constants.
5. Weights become initializers again.

Costs about 0.2 CPU seconds, whatever the size of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from qeff_proxy.common.quiet import quiet_logs
from qeff_proxy.errors import BackendError
from qeff_proxy.graph.folding import fold_graph
from qeff_proxy.graph.modules import name_units
from qeff_proxy.graph.name_scopes import layer_of
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import is_sum, size_of
from qeff_proxy.session.part_like import PartLike

__all__ = ["WEIGHT_BYTES", "fold", "specialize"]

#: Initializers of at least this many bytes are weights: they are not folded into others.
WEIGHT_BYTES = 1024
#: Results of folding may be this large, in bytes: a mask or a table of positions.
_FOLDED_BYTES = 64 * 1024 * 1024


def specialize(
    path: Path, part: PartLike, sizes: Mapping[str, int], *, strict: bool = True
) -> ir.Model:
    """Read a part and fix its shapes.

    Args:
        path: The part's ONNX file.
        part: What it takes and gives.
        sizes: Of every named axis of its inputs.
        strict: Refuse a graph in which the shape of some tensor depends on values (such as how many
            rows a router sends to each expert), even if inputs and outputs have fixed shapes.

    Returns:
        The graph, with the part's inputs and outputs, all of fixed shapes. Initializers point
        into the export's weights files (`onnx_ir.ExternalTensor`).

    Raises:
        BackendError: A shape still depends on values: names operator and node.
    """
    model = ir.load(path)
    name_units(model)  # as a recipe has them: folding takes some nodes away
    specs = {spec.name: spec for spec in part.inputs}
    for value in model.graph.inputs:
        value.shape = ir.Shape(_fixed(specs[str(value.name)], sizes))
    for node in model.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    fold(model)
    if strict:
        _check_static(model, part.name)
    return model


def fold(model: ir.Model) -> None:
    """Infer shapes and fold constants, in place; weights are neither read nor copied."""
    graph = model.graph
    own_inputs = list(graph.inputs)
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= WEIGHT_BYTES:
            weights[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    with quiet_logs("onnxscript"):  # it notes operators that it does not fold
        fold_graph(model, input_size_limit=WEIGHT_BYTES, output_size_limit=_FOLDED_BYTES)
    for value in list(graph.inputs):
        if value.name in weights and value not in own_inputs:
            graph.inputs.remove(value)
            if value.uses() or value.is_graph_output():
                value.const_value = weights[value.name]
                graph.initializers[value.name] = value


def _fixed(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    unknown = [axis for axis in spec.shape if not is_sum(axis)]
    if unknown:
        raise BackendError(f"the axis {unknown[0]} of {spec.name} is no sum of names")
    try:
        return [size_of(axis, sizes) for axis in spec.shape]
    except KeyError as error:
        raise BackendError(f"the axis {error} of {spec.name} has no size") from error


def _check_static(model: ir.Model, part: str) -> None:
    """Make sure that every tensor of the graph has a fixed shape."""
    for node, value in _produced(model.graph):
        if value.shape is None or not value.shape.is_static():
            layer = layer_of(node)
            where = "" if layer is None else f" of layer {layer}"
            raise BackendError(
                f"the shape of {value.name} in the {part} part hangs on values, not on shapes "
                f"({node.op_type} node {node.name}{where})",
                "This part has no fixed shapes; use a backend of dynamic shapes.",
            )


def _produced(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in graph:
        for value in node.outputs:
            if value.uses() or value.is_graph_output():
                yield node, value
