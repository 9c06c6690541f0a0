"""Keep a quantized checkpoint's own codes in an exported graph.

A weight becomes ``DequantizeLinear`` of its codes, scales and zero points (opset 21: 4 bits, in
blocks), rounded to the dtype of the scales, as the format's implementation does, so that the graph
has the numbers of the model in PyTorch. Source:
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from qeff_proxy.errors import UsageError
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.weight_sources import Codes, ComputedWeight, WeightSources

if TYPE_CHECKING:
    from qeff_proxy.export.model_graphs import Graphs
    from qeff_proxy.export.trace.trace_part import TracedPart

_CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_TYPES = {
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
}


def keep_all_codes(graphs: Graphs) -> None:
    """Keep the codes of all parts of a model.

    Raises:
        UsageError: There are none.
    """
    counts = [keep_codes(part, graphs.sources) for part in graphs.traced]
    for check in graphs.checks:
        if check is not None:
            keep_codes(check, graphs.sources)
    if not any(counts):
        raise no_codes()
    graphs.report["kept"] = dict(zip((part.name for part in graphs.traced), counts, strict=True))


def no_codes() -> UsageError:
    """The error about a checkpoint whose codes cannot be kept."""
    return UsageError(
        "the checkpoint has no codes that can be kept: no int4 or int8 in groups of 16 to 256 "
        "inputs that follow each other",
        "Export float weights (--weights copy).",
    )


def keep_codes(part: TracedPart, sources: WeightSources) -> int:
    """Replace weights by the codes that they are computed from, where there are such.

    Args:
        part: Its graph and weights are changed.
        sources: Where the weights come from; the codes are added.

    Returns:
        How many weights were replaced.
    """
    count = 0
    for name in list(part.weights):
        source = sources.find(name)
        if not isinstance(source, ComputedWeight) or source.codes is None:
            continue
        codes = source.codes() if source.shape == tuple(part.weights[name].shape) else None
        if codes is not None:
            _replace(part, name, codes, sources)
            count += 1
    return count


def _replace(part: TracedPart, name: str, codes: Codes, sources: WeightSources) -> None:
    graph = part.model.graph
    weight = graph.initializers.pop(name)
    rows, columns = part.weights.pop(name).shape
    kind = _CODES[codes.bits]
    own = _TYPES[codes.scales.dtype]
    inputs = []
    for tensor, dtype, shape in (
        (codes.words, kind, (rows, columns)),
        (codes.scales, own, codes.scales.shape),
        (codes.zeros, kind, codes.scales.shape),
    ):
        key = f"{name}.{tensor.key.rpartition('.')[2]}"
        value = ir.Value(name=key, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        graph.initializers[key] = value
        stored = getattr(torch, TORCH_DTYPES[tensor.dtype])
        part.weights[key] = torch.empty(tensor.shape, dtype=stored, device="meta")
        sources.stored[key] = tensor
        inputs.append(value)
    nodes: list[ir.Node] = []
    inputs[1] = _cast(inputs[1], ir.DataType.FLOAT, nodes)
    attributes = {"axis": 1, "block_size": codes.size}
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}.dequantize")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
    nodes.append(node)
    assert weight.dtype is not None  # noqa: S101 (a weight of the trace has a type)
    result = _cast(_cast(node.outputs[0], own, nodes), weight.dtype, nodes)
    result.name = f"{name}.dequantized"
    ir.convenience.replace_all_uses_with(weight, result)
    graph.insert_before(graph[0], nodes)


def _cast(value: ir.Value, dtype: ir.DataType, nodes: list[ir.Node]) -> ir.Value:
    """The value in another dtype; the node that casts it is appended."""
    if value.dtype == dtype:
        return value
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    nodes.append(node)
    return node.outputs[0]
