"""Merge matrix products that share an input.

A decoder layer multiplies one input by the weights of queries, keys and values, and another by
those of gate and up. In a decode step the threads split each product and then wait for each other;
one product of the concatenated weights makes them wait once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_DOMAIN = "com.microsoft"


def merge_products(model: ir.Model) -> bool:
    """Merge float32 products of one input with transposed weights ``[N, K]``.

    The weights are concatenated by a node that the runtime folds when it optimizes the graph.

    Returns:
        Whether any were merged; otherwise nothing was changed.
    """
    groups: dict[ir.Value, list[tuple[ir.Node, ir.Value]]] = {}
    for node in model.graph:
        weight = _weight_of(node)
        if weight is not None and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append((node, weight))
    several = [group for group in groups.values() if len(group) > 1]
    for group in several:
        _merge(model.graph, [node for node, _ in group], [weight for _, weight in group])
    if several:
        RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
    return bool(several)


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The weight ``[N, K]`` of ``x @ weight.T``, if nothing else uses it."""
    if node.op_type != "MatMul" or node.domain or node.outputs[0].is_graph_output():
        return None
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    if transpose is None or transpose.op_type != "Transpose" or transpose.domain:
        return None
    weight = transpose.inputs[0]
    tensor = weight.const_value if weight is not None else None
    if weight is None or tensor is None or not weight.is_initializer():
        return None
    used_once = len(weight.uses()) == 1 and len(transpose.outputs[0].uses()) == 1
    plain = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
    return weight if used_once and plain else None


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node], weights: Sequence[ir.Value]) -> None:
    """Replace several products by one and a ``Split`` of its result."""
    first = nodes[0]
    name = f"{first.outputs[0].name}.merged"
    columns = np.array([weight.const_value.shape[0] for weight in weights], np.int64)  # type: ignore[union-attr]
    sizes = ir.Value(
        name=f"{name}.sizes",
        shape=ir.Shape(columns.shape),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(columns, name=f"{name}.sizes"),
    )
    graph.register_initializer(sizes)
    joined = ir.node("Concat", weights, attributes={"axis": 0}, name=f"{name}.weight")
    product = ir.node(
        "FusedMatMul",
        [first.inputs[0], joined.outputs[0]],
        attributes={"transB": 1},
        domain=_DOMAIN,
        name=name,
    )
    parts = ir.node(
        "Split",
        [product.outputs[0], sizes],
        attributes={"axis": -1},
        num_outputs=len(nodes),
        name=f"{name}.parts",
    )
    joined.outputs[0].name, product.outputs[0].name = f"{name}.weight", name
    for node in (joined, product, parts):
        node.metadata_props.update(first.metadata_props)
    graph.insert_before(first, [joined, product, parts])
    for node, new in zip(nodes, parts.outputs, strict=True):
        old = node.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
