"""Graphs that differ in names and weights have one structure; others do not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qeff_proxy.graph.structure import structure_of


def graph(
    name: str = "layers.0",
    *,
    width: int = 128,
    epsilon: float = 1e-5,
    axis: int = 0,
    swap: bool = False,
) -> ir.Model:
    x = ir.Value(
        name=f"{name}.x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", width])
    )
    random = np.random.default_rng(len(name))
    values = {"weight": random.random((width, width), np.float32), "epsilon": np.float32([epsilon])}
    held = []
    for key, array in values.items():
        tensor = ir.tensor(array, name=f"{name}.{key}")
        held.append(
            ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
        )
    product = ir.node("MatMul", [x, held[0]])
    added = ir.node("Sub", [held[1], product.outputs[0]] if swap else [product.outputs[0], held[1]])
    softmax = ir.node("Softmax", [added.outputs[0]], attributes={"axis": axis})
    for node in (product, added, softmax):
        node.outputs[0].name = f"{name}.{node.op_type}"
    nodes = [product, added, softmax]
    return ir.Model(ir.Graph([x], softmax.outputs, nodes=nodes, initializers=held), ir_version=10)


def test_names_and_weights_make_no_difference():
    assert structure_of(graph("layers.0")) == structure_of(graph("layers.17"))


@pytest.mark.parametrize("change", [{"width": 64}, {"epsilon": 1e-6}, {"axis": 1}, {"swap": True}])
def test_what_is_computed_does(change):
    assert structure_of(graph()) != structure_of(graph(**change))
