"""Computes what a graph computes of its weights alone: weights turned, shared or joined.

A compiler of float graphs does it by itself. A quantizer takes a weight behind a Transpose or an
Identity for an activation, and gives it a type and a range of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnxruntime

from qeff_proxy.backends.fixed_shapes.compiler_fixes import constants_of

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

__all__ = ["fold_weights"]


def fold_weights(model: ir.Model, weights: Path) -> None:
    """Put an initializer in place of every value that depends on initializers alone.

    Args:
        model: Changed in place.
        weights: The folder that the weights' files are in.

    Each is computed when its elements are asked for, so that they need not all be in memory.
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
    """Gives a tensor that a graph without inputs computes."""

    def __init__(self, model: ir.Model, weights: Path, name: str) -> None:
        self._model = model
        self._weights = weights
        self._name = name

    def __call__(self) -> ir.TensorProtocol:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._weights)
        )
        session = onnxruntime.InferenceSession(
            ir.to_proto(self._model).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        (array,) = session.run(None, {})
        found: Array = array
        return ir.Tensor(found, name=self._name)
