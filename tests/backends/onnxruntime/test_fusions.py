"""How graphs are rewritten for ONNX Runtime: each means what it meant, in fewer operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from qeff_proxy.backends.onnxruntime.fuse_products import merge_products
from qeff_proxy.backends.onnxruntime.fuse_rotary import fuse_rotary

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

ROTARY = """<ir_version: 10, opset_import: ["": 20]>
turn (float[batch, 2, query, 8] x, int64[batch, query] positions) => (float[batch, 2, query, 8] y)
<float[4] speeds = {1, 0.5, 0.25, 0.1}, float scale = {1.5}, int64[1] two = {2}, int64[1] one = {1},
 int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {9223372036854775807},
 int64[1] last = {3}, float[batch, query, 8] cos, float[batch, query, 8] scaled,
 float[batch, query, 8] sin> {
    columns = Unsqueeze(positions, two)
    numbers = Cast <to: int = 1> (columns)
    some = Mul(numbers, speeds)
    others = Neg(some)
    angles = Concat <axis: int = -1> (some, some)
    cos = Cos(angles)
    scaled = Mul(cos, scale)
    sin = Sin(angles)
    cos_h = Unsqueeze(scaled, one)
    sin_h = Unsqueeze(sin, one)
    straight = Mul(x, cos_h)
    low = Slice(x, zero, half, last, one)
    high = Slice(x, half, end, last, one)
    less = Neg(high)
    crossed = Concat <axis: int = -1> (less, low)
    turned = Mul(crossed, sin_h)
    sum = Add(straight, turned)
    y = Identity(sum)
}"""

PRODUCTS = """<ir_version: 10, opset_import: ["": 20]>
products (float[batch, query, 6] x) => (float[batch, query, 4] y, float[batch, query, 6] z)
<float[4, 6] a, float[2, 6] b, float[6, 6] c> {
    at = Transpose <perm: ints = [1, 0]> (a)
    bt = Transpose <perm: ints = [1, 0]> (b)
    ct = Transpose <perm: ints = [1, 0]> (c)
    xa = MatMul(x, at)
    xb = MatMul(x, bt)
    z = MatMul(x, ct)
    both = Concat <axis: int = -1> (xb, xb)
    y = Add(xa, both)
}"""


def run(proto: onnx.ModelProto, feeds: Mapping[str, Array], level: Any = None) -> list[Array]:
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, dict(feeds))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def turned_feeds() -> dict[str, Array]:
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 8)).astype(np.float32)
    return {"x": x, "positions": np.array([[0, 0, 1], [5, 6, 7]])}  # the first padded on the left


def test_a_rotary_embedding_is_one_operator_whatever_the_positions() -> None:
    proto = onnx.parser.parse_model(ROTARY)
    model = ir.from_proto(proto)
    assert fuse_rotary(model)
    assert not fuse_rotary(model)
    assert operators(model).count("RotaryEmbedding") == 1
    assert not {"Neg", "Add"} & set(operators(model))
    (expected,) = run(proto, turned_feeds())
    (found,) = run(ir.to_proto(model), turned_feeds())
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("(some, some)", "(some, others)"),  # halves of different angles
        ("(less, low)", "(low, less)"),  # turned by other halves
        ("Slice(x, zero, half, last, one)", "Slice(x, half, end, last, one)"),
        ("Slice(x, half, end, last, one)", "Slice(x, half, end, last, two)"),
        ("cos = Cos(angles)", "cos = Sin(angles)"),
        ("Unsqueeze(sin, one)", "Unsqueeze(sin, zero)"),  # a table of other rows
        ("Mul(cos, scale)", "Mul(cos, cos)"),
    ],
)
def test_what_is_no_rotary_embedding_stays_as_it_is(written: str, instead: str) -> None:
    assert written in ROTARY
    model = ir.from_proto(onnx.parser.parse_model(ROTARY.replace(written, instead)))
    before = operators(model)
    assert not fuse_rotary(model)
    assert operators(model) == before


def products() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(PRODUCTS)
    numbers = np.random.default_rng(0)
    for name, rows in (("a", 4), ("b", 2), ("c", 6)):
        weight = numbers.standard_normal((rows, 6)).astype(np.float32)
        kept = next((one for one in proto.graph.initializer if one.name == name), None)
        if kept is not None:
            proto.graph.initializer.remove(kept)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return proto


def test_products_of_one_input_are_one_product() -> None:
    proto = products()
    model = ir.from_proto(proto)
    assert merge_products(model)
    assert not merge_products(model)
    # The third gives an output of the graph, whose name is not ours to give away.
    assert operators(model).count("MatMul") == operators(model).count("FusedMatMul") == 1
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 6)).astype(np.float32)}
    for expected, found in zip(run(proto, x), run(ir.to_proto(model), x), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_weight_that_two_products_share_is_not_copied() -> None:
    proto = products()
    transposes = [node for node in proto.graph.node if node.op_type == "Transpose"]
    transposes[1].input[0] = "a"
    proto.graph.node[-2].input[1] = "xa"
    model = ir.from_proto(proto)
    assert not merge_products(model)
