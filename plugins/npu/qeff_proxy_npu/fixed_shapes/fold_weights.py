"""Fold what a graph computes of its weights alone: weights transposed, shared or joined.

Compilers of float graphs do this themselves. A quantizer takes a weight behind a Transpose or an
Identity for an activation, and gives it a type and a range of its own.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from qeff_proxy.backends.onnxruntime.open_graph import open_graph

from qeff_proxy_npu.fixed_shapes.compiler_fixes import constants_of

__all__ = ["fold_weights"]


def fold_weights(model: ir.Model, weights: Path) -> None:
    """Put an initializer in place of every value that depends on initializers alone.

    Args:
        model: Changed in place.
        weights: The folder of the weights' files.

    Each is computed when its elements are read, so that not all are in memory at once.
    """
    graph = model.graph
    constants = constants_of(graph)
    computed = [value for node in graph for value in node.outputs if value in constants]
    for value in computed:
        if all(use.node.outputs[0] in constants for use in value.uses()):
            continue
        name, shape = str(value.name), value.shape
        assert isinstance(shape, ir.Shape)  # noqa: S101 (all shapes of the graph are fixed)
        part = ir.Model(ir.convenience.extract(graph, [], [value]), ir_version=model.ir_version)
        value.name = f"{name}.computed"
        folded = ir.Value(name=name, shape=shape, type=value.type)
        folded.const_value = ir.LazyTensor(
            _Computed(part, weights, name), dtype=value.dtype or ir.DataType.FLOAT,
            shape=shape, name=name,
        )  # fmt: skip
        value.replace_all_uses_with(folded)
        graph.initializers[name] = folded
    for node in reversed(list(graph)):
        if node.outputs[0] in constants and not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


class _Computed:
    """Computes the tensor of a graph without inputs."""

    def __init__(self, model: ir.Model, weights: Path, name: str) -> None:
        self._model = model
        self._weights = weights
        self._name = name

    def __call__(self) -> ir.TensorProtocol:
        graph = ir.to_proto(self._model).SerializeToString()
        (array,) = open_graph(graph, weights=self._weights).run(None, {})
        return ir.Tensor(array, name=self._name)
