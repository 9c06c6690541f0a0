"""Norms in the form that ONNX Runtime fuses.

An exported RMSNorm multiplies by ``Reciprocal(Sqrt(…))``, which accelerators' compilers want. ONNX
Runtime has one kernel for the whole norm, but looks for a division by ``Sqrt(…)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["divide_in_norms"]


def divide_in_norms(model: ir.Model) -> bool:
    """Turn ``x * Reciprocal(Sqrt(y))`` into ``x / Sqrt(y)``.

    Returns:
        Whether there was any; otherwise nothing was changed.
    """
    found = list(_products_of(model.graph))
    for product, value, root in found:
        old = product.outputs[0]
        quotient = ir.node("Div", [value, root], name=product.name)
        quotient.metadata_props.update(product.metadata_props)
        new = quotient.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_nodes_and_values(
            model.graph, product, [product], [quotient], [old], [new]
        )
    if found:
        RemoveUnusedNodesPass()(model)  # a root that is used twice is not fused
    return bool(found)


def _products_of(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Each such product, with x and the root."""
    for node in graph:
        root = node.inputs[0] if node.op_type == "Reciprocal" and not node.domain else None
        producer = root.producer() if root is not None else None
        if root is None or producer is None or producer.op_type != "Sqrt":
            continue
        for user, index in node.outputs[0].uses():
            value = user.inputs[1 - index] if user.op_type == "Mul" else None
            if value is not None and not user.outputs[0].is_graph_output():
                yield user, value, root
