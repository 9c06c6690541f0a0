"""Rotary embeddings in the kernel that ONNX Runtime has for them.

An exported graph turns each query and key by ``x * cos + concat(-x2, x1) * sin``: seven operators,
whose overhead is more than what they compute in a decode step. ONNX Runtime has one operator for
all, ``com.microsoft.RotaryEmbedding``, whose tables hold cosine and sine of half the width: here
they are those of the step's own positions, made once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["fuse_rotary"]

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _Turn:
    """One rotary embedding: ``x [batch, heads, query, width]``, turned by angles.

    Attributes:
        total: The addition at its end.
        x: What is turned.
        cos: ``[batch, query, width]``, the second half as the first.
        sin: The same.
    """

    total: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def fuse_rotary(model: ir.Model) -> bool:
    """Put the runtime's own operator in the place of each rotary embedding in float32.

    Returns:
        Whether there was any; otherwise nothing was changed.
    """
    graph = model.graph
    found = [turn for node in graph if (turn := _turn_of(node)) is not None]
    halves: dict[ir.Value, ir.Value] = {}
    rows: dict[ir.Value, ir.Value] = {}
    for turn in found:
        for table in (turn.cos, turn.sin):
            if table not in halves:
                halves[table] = _half_of(graph, table)
        if turn.cos not in rows:
            rows[turn.cos] = _rows_of(graph, turn.cos)
        node = ir.node(
            "RotaryEmbedding",
            [turn.x, rows[turn.cos], halves[turn.cos], halves[turn.sin]],
            domain=_DOMAIN,
            name=turn.total.name,
        )
        node.metadata_props.update(turn.total.metadata_props)
        old, new = turn.total.outputs[0], node.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_nodes_and_values(
            graph, turn.total, [turn.total], [node], [old], [new]
        )
    if found:
        RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
    return bool(found)


def _turn_of(node: ir.Node) -> _Turn | None:
    """The rotary embedding that ends with this addition, if it is one."""
    if node.op_type != "Add" or node.domain or node.outputs[0].is_graph_output():
        return None
    products = [_factors(value) for value in node.inputs]
    for straight, crossed in (products, products[::-1]):
        for cross, sin in (crossed, crossed[::-1]):
            x = _crossed(cross)
            if x is None or x not in straight:
                continue
            cos = straight[1 - straight.index(x)]
            found = _table_of(cos, "Cos"), _table_of(sin, "Sin")
            if found[0] is not None and found[1] is not None and _fits(x, found[0], found[1]):
                return _Turn(node, x, found[0], found[1])
    return None


def _factors(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The two factors that a value is the product of."""
    product = value.producer() if value is not None else None
    if product is None or product.op_type != "Mul" or product.domain:
        return None, None
    return product.inputs[0], product.inputs[1]


def _crossed(value: ir.Value | None) -> ir.Value | None:
    """The x of ``concat(-x[h:], x[:h])``."""
    joined = _made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].value not in (-1, 3):
        return None
    second = _made_by(joined.inputs[0], "Neg")
    high = _made_by(second.inputs[0], "Slice") if second is not None else None
    low = _made_by(joined.inputs[1], "Slice")
    if high is None or low is None or high.inputs[0] is not low.inputs[0]:
        return None
    x = low.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return None
    half, odd = divmod(x.shape[3], 2)
    if odd or _part_of(low) != (0, half) or _part_of(high) != (half, 2 * half):
        return None
    return x


def _part_of(node: ir.Node) -> tuple[int, int] | None:
    """From where to where a ``Slice`` cuts the last axis."""
    start, end, axis, step = (_numbers(value) for value in (*node.inputs[1:], None)[:4])
    width = node.inputs[0].shape[3] if node.inputs[0] is not None else None  # type: ignore[index]
    if start is None or end is None or axis not in ([3], [-1]) or step not in (None, [1]):
        return None
    return start[0], min(end[0], width)  # type: ignore[type-var, return-value]


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(one) for one in np.ravel(tensor.numpy())]


def _table_of(value: ir.Value | None, function: str) -> ir.Value | None:
    """The ``[batch, query, width]`` behind a table with heads, if its two halves are equal."""
    spread = _made_by(value, "Unsqueeze")
    if spread is None or _numbers(spread.inputs[1]) != [1]:
        return None
    table = value = spread.inputs[0]
    while (node := _made_by(value, "Mul", "Cast")) is not None:  # scaled, or of another precision
        if node.op_type == "Mul":
            scales = [one for one in node.inputs if one is not None and one.const_value is not None]
            if len(scales) != 1 or scales[0].const_value.size != 1:  # type: ignore[union-attr]
                return None
            value = node.inputs[1 - node.inputs.index(scales[0])]
        else:
            value = node.inputs[0]
    angles = _made_by(value, function)
    joined = _made_by(angles.inputs[0], "Concat") if angles is not None else None
    twice = joined is not None and len(joined.inputs) == 2 and joined.inputs[0] is joined.inputs[1]
    return table if twice and joined.attributes["axis"].value in (-1, 2) else None  # type: ignore[union-attr]


def _fits(x: ir.Value, *tables: ir.Value) -> bool:
    """Whether tables are of the rows, queries and width of x, and all in float32."""
    for value in (x, *tables):
        if value.dtype != ir.DataType.FLOAT or value.shape is None:
            return False
    batch, _, query, width = x.shape  # type: ignore[misc]
    return all(list(table.shape) == [batch, query, width] for table in tables)  # type: ignore[arg-type]


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that gives the value, if it is one of these operators of ONNX."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and not node.domain else None


def _half_of(graph: ir.Graph, table: ir.Value) -> ir.Value:
    """``[batch * query, width / 2]`` of a table ``[batch, query, width]``."""
    width = int(table.shape[2])  # type: ignore[index, arg-type]
    ends = [
        _constant(graph, f"{table.name}.{name}", [number])
        for name, number in (("start", 0), ("end", width // 2), ("axis", 2))
    ]
    cut = ir.node("Slice", [table, *ends])
    shape = _constant(graph, f"{table.name}.rows", [-1, width // 2])
    flat = ir.node("Reshape", [cut.outputs[0], shape])
    return _after(graph, table, [cut, flat], table.name)


def _rows_of(graph: ir.Graph, table: ir.Value) -> ir.Value:
    """``[batch, query]``: which row of the flat tables is that of each position."""
    zero, one = (_constant(graph, f"{table.name}.{n}", n) for n in (0, 1))
    sizes = ir.node("Shape", [table], attributes={"start": 0, "end": 2})
    count = ir.node("ReduceProd", [sizes.outputs[0]], attributes={"keepdims": 0})
    numbers = ir.node("Range", [zero, count.outputs[0], one])
    rows = ir.node("Reshape", [numbers.outputs[0], sizes.outputs[0]])
    return _after(graph, table, [sizes, count, numbers, rows], f"{table.name}.rows")


def _after(
    graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node], name: str | None
) -> ir.Value:
    """Have nodes compute something from a value; what the last of them gives."""
    producer = value.producer()
    assert producer is not None  # noqa: S101 (as _table_of found it)
    for number, node in enumerate(nodes):
        node.name = f"{name}.rotary_{number}"
        node.outputs[0].name = f"{name}.rotary_{number}"
        node.metadata_props.update(producer.metadata_props)
    graph.insert_after(producer, nodes)
    return nodes[-1].outputs[0]


def _constant(graph: ir.Graph, name: str, numbers: int | list[int]) -> ir.Value:
    tensor = ir.Tensor(np.array(numbers, np.int64), name=f"{name}.rotary")
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
