"""Whole numbers of 16 bits as HTP has them, and half precision among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from qeff_proxy.cli import main
from qeff_proxy_npu.qnn.diagnosis import first_failing_node
from qeff_proxy_npu.qnn.quantize import quantize_graph

pytestmark = pytest.mark.one_home

RANGES: Any = {"x": (-3.0, 3.0), "y": (-3.0, 3.0), "z": (-9.0, 9.0)}
BITS = {"a16w8": (ir.DataType.INT16, ir.DataType.UINT16), "a8w8": (ir.DataType.UINT8,) * 2}


def quantized(folder: Path, precision: str, *, signed: bool) -> ir.Model:
    """A product with a weight, and one of two activations."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="weighted"),
            helper.make_node("MatMul", ["x", "y"], ["z"], name="product"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [8, 8])],
        [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(proto), folder / "m.onnx")
    model, _ = quantize_graph(
        ir.load(folder / "m.onnx"), folder, RANGES, [], precision, folder, signed_factors=signed
    )
    return model


@pytest.mark.parametrize("precision", list(BITS))
def test_both_factors_of_a_product_of_activations_have_16_bits(
    tmp_path: Path, precision: str
) -> None:
    """HTP reads an unsigned second factor in 8 bits; weights, and a8w8, stay as they are."""
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for signed, kind in zip((True, False), BITS[precision], strict=True):
        model = quantized(tmp_path, precision, signed=signed)
        kinds: dict[str | None, Any] = {}
        for node in model.graph:
            maker = node.inputs[1].producer() if node.op_type == "MatMul" else None  # type: ignore[union-attr]
            if maker is not None:
                kinds[node.name] = maker.inputs[2].const_value.dtype  # type: ignore[union-attr]
        assert kinds == {"weighted": ir.DataType.INT8, "product": kind}
        ir.save(model, tmp_path / "q.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), settings)
        (z,) = session.run(None, {"x": x})
        noise = 10 * np.log10(np.square(x @ x).sum() / np.square(x @ x - z).sum())
        assert noise > (70 if precision == "a16w8" else 25)


@pytest.mark.parametrize("precision", list(BITS))
def test_where_a_quantized_graph_fails_is_found(tmp_path: Path, precision: str) -> None:
    """Its nodes are in an order, so that it can be cut anywhere."""
    model = quantized(tmp_path, precision, signed=True)
    for name in ("weighted", "product"):
        node = first_failing_node(model, lambda graph, name=name: name in names_in(graph))  # type: ignore[misc]
        assert node is not None
        assert node.name == name


@pytest.mark.parametrize(
    ("wide", "quantized_in"),
    [("MatMul Softmax", set()), ("MatMul", {"t", "z"}), ("Softmax", {"x", "y", "t"})],
)
def test_what_moves_a_wide_result_is_wide(
    tmp_path: Path, wide: str, quantized_in: set[str]
) -> None:
    """A reshape's result is quantized only where what it moves is, or what reads it."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="weighted"),
            helper.make_node("Reshape", ["y", "shape"], ["t"], name="moves"),
            helper.make_node("Softmax", ["t"], ["z"], name="softmax"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 16])],
        [
            numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"),
            numpy_helper.from_array(np.array([4, 16]), "shape"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "m.onnx")
    ranges: Any = {**RANGES, "t": RANGES["y"], "z": (0.0, 1.0)}
    model, _ = quantize_graph(
        ir.load(tmp_path / "m.onnx"), tmp_path, ranges, [], "a8w8", tmp_path,
        lambda node: node.op_type in wide.split(),
    )  # fmt: skip
    taken = {n.inputs[0].name for n in model.graph if n.op_type == "QuantizeLinear"}  # type: ignore[union-attr]
    assert {str(name).split("_")[0] for name in taken} == quantized_in


def names_in(model: ir.Model) -> set[str | None]:
    return {node.name for node in model.graph}


def test_a_recipe_gains_on_htp_what_the_simulation_says(
    make_export: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's optimizer must not quantize again what stays in half precision."""
    text = tmp_path / "calibration.txt"
    text.write_text(
        "Anna went to the market\nThe cat sat on the mat\nOne day, a boy found a ball\n"
    )
    code = main(
        [
            *("recipe", str(make_export("gpt2").folder), "--backend", "qnn", "--json"),
            *("--precision", "a16w8", "--max-wide", "20%", "--calibrate", str(text)),
            *("--prompt", "Tom saw a dog in the park.", "--write", str(tmp_path / "r.toml")),
            *("--prefill-seq-len", "8", "--ctx-len", "32"),
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert code == 0, result
    found, before, after = (result[name] for name in ("found", "before", "after"))
    assert before["sqnr"] == pytest.approx(found["low"]["sqnr"], abs=1)
    assert after["sqnr"] == pytest.approx(found["distance"]["sqnr"], abs=1)
    assert after["sqnr"] > before["sqnr"] + 1
    assert (tmp_path / "r.toml").is_file()
