"""Quantizes a graph of fixed shapes for HTP, with ONNX Runtime's quantizer.

The quantizer puts QuantizeLinear and DequantizeLinear nodes around every operator; the Qualcomm
compiler makes operators of 8 and 16 bits of them. Its own rules for that compiler
(``get_qnn_qdq_config``) are followed. Every row of a weight has a scale of its own. What these
rules lack: HTP reads the second factor of a product of two activations in 16 bits only if it is
signed and symmetric, and else, without a word, in 8 (37 dB in place of 69).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from qeff_proxy.errors import BackendError
from qeff_proxy.graph.modules import MOVES

from qeff_proxy_npu.fixed_shapes.fold_weights import fold_weights
from qeff_proxy_npu.fixed_shapes.tensor_ranges import Ranges, bound_masks

__all__ = ["ACTIVATION_BITS", "WEIGHTS", "quantize_graph"]

#: Precision → bits of an activation. Weights have 8.
ACTIVATION_BITS = {"a16w8": 16, "a8w8": 8}
#: A range is wider than what was seen by this share of it, on both sides. Other inputs go beyond,
#: and of 65,536 steps there are enough; of 256 there are not.
_MARGIN = {"a16w8": 0.5, "a8w8": 0.0}
#: The file that the weights of a quantized graph are written to.
WEIGHTS = "quantized-weights.bin"
#: Smaller tensors, such as scales, stay in the graph.
_INLINE = 1024


def quantize_graph(
    model: ir.Model,
    weights: Path,
    seen: Ranges,
    masks: Sequence[str],
    precision: str,
    folder: Path,
    stays: Callable[[ir.Node], bool] = lambda _node: False,
    *,
    signed_factors: bool = False,
) -> tuple[ir.Model, float]:
    """Quantize a graph.

    Args:
        model: Of fixed shapes, in float32; it is used up.
        weights: The folder that its weights' files are in.
        seen: Ranges of every floating tensor that it takes or computes, from calibration.
        masks: Those of its inputs that are additive attention masks.
        precision: Of `ACTIVATION_BITS`.
        folder: Where `WEIGHTS` is written.
        stays: Which nodes stay in half precision.
        signed_factors: Whether the chip multiplies activations of 16 bits by signed ones.

    Returns:
        The quantized graph, with the same inputs and outputs in float32, and the lowest number
        that its masks need: they must go no lower. Its weights lie in ``folder``.

    Raises:
        BackendError: A tensor has no range, since no calibration input went that way.
    """
    wider = 1 + _MARGIN[precision]
    ranges = {name: (low * wider, high * wider) for name, (low, high) in seen.items()}
    lowest_mask, bounded = bound_masks(model.graph, masks, ranges)
    ranges.update(bounded)
    fold_weights(model, weights)
    _check_ranges(model.graph, ranges)
    axes = _row_axes(model.graph)
    kept = _in_half_precision(model.graph)
    kept += _staying(model.graph, stays, kept)
    quantized = ir.from_proto(_quantized(_with_weights(model), ranges, precision, axes, kept))
    quantized.graph.sort()  # the quantizer appends what it adds
    if signed_factors and ACTIVATION_BITS[precision] == 16:
        _sign_factors(quantized.graph)
    quantized = ir.external_data.unload_from_model(
        quantized, folder, WEIGHTS, size_threshold_bytes=_INLINE
    )
    return quantized, lowest_mask


def _quantized(
    proto: onnx.ModelProto,
    ranges: Ranges,
    precision: str,
    axes: Mapping[str, int],
    kept: list[str],
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    wide = ACTIVATION_BITS[precision] == 16
    rows = {
        name: [{"quant_type": QuantType.QInt8, "axis": axis, "symmetric": True}]
        for name, axis in axes.items()
    }
    config = get_qnn_qdq_config(
        proto,
        None,
        activation_type=QuantType.QUInt16 if wide else QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
        init_overrides=rows,
        nodes_to_exclude=kept or None,
    )
    add_infer_metadata(proto)  # every shape is known: it need not write the model to infer them
    found = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        proto,
        config.per_channel,
        config.reduce_range,
        config.weight_type,
        config.activation_type,
        TensorsData(CalibrationMethod.MinMax, found),
        [],
        kept,
        config.op_types_to_quantize,
        config.extra_options,
    )
    quantizer.quantize_model()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _sign_factors(graph: ir.Graph) -> None:
    """Let products of two activations read the second one in 16 bits, signed and symmetric."""
    signed: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "MatMul" or not all(
            use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()
        ):
            continue
        value = node.inputs[1]
        maker = None if value is None else value.producer()
        if value is None or maker is None or maker.op_type != "DequantizeLinear":
            continue
        steps, scale, zero = (one.const_value if one is not None else None for one in maker.inputs)
        if steps is not None or scale is None or zero is None:  # a weight
            continue
        if value not in signed:
            last, middle = np.iinfo(np.uint16).max, int(zero.numpy())
            most = np.float32(max(middle, last - middle) / np.iinfo(np.int16).max)
            given = []
            for name, array in (("step", scale.numpy() * most), ("zero", np.asarray(0, np.int16))):
                tensor = ir.tensor(array, name=f"{value.name}.{name}")
                given.append(ir.Value(name=tensor.name, const_value=tensor))
                graph.register_initializer(given[-1])
            narrow = ir.node("QuantizeLinear", [value, *given], domain=maker.domain)
            wide = ir.node("DequantizeLinear", [narrow.outputs[0], *given], domain=maker.domain)
            for one, name in ((narrow, "signed"), (wide, "factor")):
                one.name = one.outputs[0].name = f"{value.name}.{name}"
            graph.insert_before(node, [narrow, wide])
            signed[value] = wide.outputs[0]
        node.replace_input_with(1, signed[value])


def _with_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph as ONNX, its weights read into it one after another."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = ir.Tensor(np.zeros(0, np.float32), name=value.name)
    proto = ir.to_proto(model)
    for initializer in proto.graph.initializer:
        tensor = tensors[initializer.name]
        if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):
            initializer.CopyFrom(onnx.numpy_helper.from_array(tensor.numpy(), initializer.name))
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
    return proto


def _row_axes(graph: ir.Graph) -> dict[str, int]:
    """Weight → the axis whose rows have scales of their own, which is that of the outputs."""
    axes: dict[str, int] = {}
    refused: set[str] = set()
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer():
                continue
            name, axis = str(value.name), _row_axis(node, index)
            if axis is None or axes.setdefault(name, axis) != axis:
                refused.add(name)
    return {name: axis for name, axis in axes.items() if name not in refused}


def _row_axis(node: ir.Node, index: int) -> int | None:
    value: Any = node.inputs[index]
    rank = len(value.shape)
    if index != 1 or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    if node.op_type == "Conv":
        return 0
    if rank != 2:
        return None
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB")
    return 0 if transposed else 1


def _in_half_precision(graph: ir.Graph) -> list[str]:
    """Names of the nodes of RMSNorms, which are not quantized.

    A mean of squares, and one over its root, take values of many magnitudes. In 16 bits the
    Qualcomm compiler's emulator gives nothing like them (0 dB for embeddings of 0.02), though the
    same graph on a CPU is right.
    """
    found: dict[ir.Node, None] = {}
    inner: set[ir.Value] = set()  # what the norm computes and has not applied yet
    for node in graph:
        square = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "ReduceMean" and square is not None and _squares(square):
            found[square] = None
        elif not any(value in inner for value in node.inputs):
            continue
        found[node] = None
        if node.op_type not in ("Mul", "Div"):
            inner.update(node.outputs)
    return [str(node.name) for node in found]


def _squares(node: ir.Node) -> bool:
    return node.op_type == "Pow" or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])


def _staying(graph: ir.Graph, stays: Callable[[ir.Node], bool], kept: Collection[str]) -> list[str]:
    """Names of the nodes that stay in half precision, and of those that only move their results.

    The quantizer puts the latter in between whether or not their inputs are quantized. That would
    round once more, and the compiler fails where nothing else around them is.
    """
    whole = {node for node in graph if node.name in kept}
    found = []
    for node in graph:
        makers = {
            value.producer()
            for value in node.inputs
            if value is not None and value.dtype == ir.DataType.FLOAT and not value.is_initializer()
        } - {None}  # an input of the graph, such as a cache
        if node not in whole and (
            stays(node) or (node.op_type in MOVES and makers and makers <= whole)
        ):
            whole.add(node)
            found.append(str(node.name))
    return found


def _check_ranges(graph: ir.Graph, ranges: Ranges) -> None:
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name not in ranges:
                raise BackendError(
                    f"no calibration input went through {node.op_type} node {node.name}, so that "
                    f"{value.name} has no range",
                    "Calibrate on inputs of the sizes that are compiled.",
                )
