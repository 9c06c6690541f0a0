"""Weights of matrix products in 8 or 4 bits, by ONNX Runtime's own quantizer.

Each column of a weight ``[K, N]`` is quantized in blocks of ``block_size`` rows with a scale and a
zero point; the product becomes a ``MatMulNBits`` node of ONNX Runtime. Weights are read, quantized
and written one at a time, so memory does not grow with the model. Other tensors (norms, biases,
position tables) are not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.backends.onnxruntime.options import WeightOptions

_ALIGNMENT = 4096  # a page, so that a runtime can map the file
_IN_FLOAT, _IN_INT8 = 1, 4  # MatMulNBits' accuracy_level
_INLINE = 1024  # tensors of at most so many bytes stay in the graph's file


@dataclass(frozen=True)
class _Quantized:
    """Blocks, scales and zero points of a weight ``[rows, columns]``, as initializers.

    Attributes:
        values: The initializers.
        rows: What the product sums over.
        columns: Of its result.
        bits: Of an element.
        size: Rows of a block.
    """

    values: tuple[ir.Value, ...]
    rows: int
    columns: int
    bits: int
    size: int


def quantize_weights(
    model: ir.Model,
    data: Path | None,
    options: WeightOptions,
    wide: Callable[[ir.Node], bool] = lambda _node: False,
) -> bool:
    """Quantize the weights of a graph's matrix products.

    Args:
        model: The graph, with external weights. It is changed in place.
        data: The file to write all its weights to, in the folder the graph will be saved in;
            ``None`` leaves the others where they are, and holds the quantized ones in memory.
        options: With `WeightOptions.bits` or ``keep``.
        wide: Products that keep their weights.

    Returns:
        Whether any weight was quantized; otherwise nothing was changed.

    Raises:
        BackendError: A weight has NaN or infinite elements.
    """
    graph = model.graph
    of_kind = _kept_weight_of if options.keep else weight_of
    products = [
        (node, use) for node in graph if (use := of_kind(node)) is not None and not wide(node)
    ]
    if not products:
        return False
    done: dict[tuple[str, bool], _Quantized] = {}
    with nullcontext() if data is None else data.open("wb") as file:
        for node, (weight, transposed) in products:
            key = (str(weight.name), transposed)
            if key not in done and options.keep:
                done[key] = _kept(graph, weight, file)
            elif key not in done:
                done[key] = _quantized(graph, weight, file, options, transposed=transposed)
            _replace(graph, node, done[key], options)
        RemoveUnusedNodesPass()(model)
        for value in graph.initializers.values():
            tensor = value.const_value
            outside = isinstance(tensor, ir.ExternalTensor) and tensor.path != str(data)
            if file is not None and outside and tensor is not None:
                value.const_value = _stored(tensor.numpy(), str(value.name), file)
    model.opset_imports.setdefault("com.microsoft", 1)
    return True


def weight_of(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The float weight of a matrix product, and whether it is ``[N, K]``; else ``None``."""
    value, transposed = _operand_of(node) or (None, False)
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    tensor = value.const_value
    floating = tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return (value, transposed) if floating and len(tensor.shape) == 2 else None


def _kept_weight_of(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The weight ``[N, K]`` of a product that is dequantized from the checkpoint's codes."""
    value, transposed = _operand_of(node) or (None, False)
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type == "Cast" and not producer.domain:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or not transposed:
        return None
    assert value is not None  # noqa: S101 (it has a producer)
    blocks = producer.attributes.get_int("block_size", 0)
    given = all(_constant(one) is not None for one in producer.inputs)
    whole = given and len(producer.inputs) == 3 and producer.attributes.get_int("axis", 1) == 1
    return (value, True) if whole and blocks else None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value is, perhaps in another dtype."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        return _constant(producer.inputs[0])
    return None if value is None else value.const_value


def _operand_of(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The second factor of a matrix product, and whether it is stored as ``[N, K]``."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    value = node.inputs[1]
    if value is None:
        return None
    transposed = False
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        for name, default in plain.items():
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value != default:
                return None
        attribute = node.attributes.get("transB")
        transposed = attribute is not None and attribute.value == 1
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        order = producer.attributes.get("perm")
        if order is not None and list(order.value) != [1, 0]:
            return None
        value, transposed = producer.inputs[0], not transposed
    return None if value is None else (value, transposed)


def _kept(graph: ir.Graph, weight: ir.Value, file: BinaryIO | None) -> _Quantized:
    """The checkpoint's codes of a weight, whose order is that of ``MatMulNBits``."""
    producer = weight.producer()
    assert producer is not None  # noqa: S101 (as _kept_weight_of found it)
    codes, scales, zeros = (_constant(one) for one in producer.inputs)
    assert codes is not None and scales is not None and zeros is not None  # noqa: S101, PT018
    columns, rows = codes.shape.numpy()
    size = producer.attributes.get_int("block_size", 0)
    bits = 4 if codes.dtype == ir.DataType.UINT4 else 8
    words = np.frombuffer(codes.tobytes(), np.uint8).reshape(columns, rows // size, -1)
    points: Array = zeros.numpy().astype(np.uint8)
    if bits == 4:  # each column begins with a byte of its own
        points = np.pad(points, ((0, 0), (0, points.shape[1] % 2)))
        points = points[:, ::2] | (points[:, 1::2] << 4)
    parts = (words, scales.numpy().astype(np.float32), points)
    return _Quantized(_registered(graph, str(weight.name), parts, file), rows, columns, bits, size)


def _registered(
    graph: ir.Graph, prefix: str, parts: Sequence[Array], file: BinaryIO | None
) -> tuple[ir.Value, ...]:
    """Write blocks, scales and zero points, and add them to a graph."""
    values = []
    for part, ending in zip(parts, ("quantized", "scales", "zero_points"), strict=True):
        name = f"{prefix}.{ending}"
        tensor = _stored(part, name, file)
        value = ir.Value(
            name=name,
            shape=ir.Shape(part.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        values.append(value)
    return tuple(values)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Undo what the quantizer's module does as it is imported: it makes all libraries log."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _quantized(
    graph: ir.Graph,
    weight: ir.Value,
    file: BinaryIO | None,
    options: WeightOptions,
    *,
    transposed: bool,
) -> _Quantized:
    """Quantize a weight and write it to ``file``."""
    with _own_logging():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    assert weight.const_value is not None  # noqa: S101 (as weight_of found it)
    array = weight.const_value.numpy()
    if not np.isfinite(array).all():
        raise BackendError(
            f"the weight {weight.name} has NaN or infinite elements, and cannot be quantized",
            "Check the checkpoint, or compile with -O weights=float.",
        )
    array = np.ascontiguousarray(array.T if transposed else array)
    config = DefaultWeightOnlyQuantConfig(
        block_size=options.block_size, is_symmetric=False, bits=options.bits
    )
    parts = DefaultWeightOnlyQuantizer(config).qbits_block_quant(array)
    prefix = f"{weight.name}.transposed" if transposed else str(weight.name)
    rows, columns = array.shape
    values = _registered(graph, prefix, parts, file)
    assert options.bits is not None  # noqa: S101 (weights are quantized only then)
    return _Quantized(values, rows, columns, options.bits, options.block_size)


def _stored(array: Array, name: str, file: BinaryIO | None) -> ir.TensorProtocol:
    """The array as a tensor: appended to ``file``, or inline if it is small or there is none."""
    if file is None or array.nbytes <= _INLINE:
        return ir.Tensor(array.copy(), name=name)
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    offset = file.tell()
    file.write(np.ascontiguousarray(array).data)
    path = Path(file.name)
    return ir.ExternalTensor(
        path.name,
        offset,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=path.parent,
    )


def _replace(graph: ir.Graph, node: ir.Node, weight: _Quantized, options: WeightOptions) -> None:
    """Replace a product by a ``MatMulNBits``, and an ``Add`` if it has a bias.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    output = node.outputs[0]
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], *weight.values],
        attributes={
            "K": weight.rows,
            "N": weight.columns,
            "bits": weight.bits,
            "block_size": weight.size,
            "accuracy_level": _IN_INT8 if options.integer_products else _IN_FLOAT,
        },
        domain="com.microsoft",
        name=node.name,
    )
    nodes = [product]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias"))
    for one in nodes:
        one.metadata_props.update(node.metadata_props)
    new = nodes[-1].outputs[0]
    new.name, new.type, new.shape = output.name, output.type, output.shape
    if output in graph.outputs:
        graph.outputs[list(graph.outputs).index(output)] = new
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [new])
