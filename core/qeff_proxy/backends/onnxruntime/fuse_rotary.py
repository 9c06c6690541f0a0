"""Rotary embeddings in the kernel that ONNX Runtime has for them.

An exported graph rotates each query and key by ``x * cos + concat(-x2, x1) * sin``: seven
operators, which cost more to start than to compute in a decode step. ONNX Runtime has one operator
for all, ``com.microsoft.RotaryEmbedding``, whose tables hold cosine and sine of half the width:
here those of the step's own positions, made once for all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

_DOMAIN = "com.microsoft"


def fuse_rotary(model: ir.Model) -> bool:
    """Put the runtime's own operator in the place of each rotary embedding in float32.

    Returns:
        Whether there was any; otherwise nothing was changed.
    """
    rules = pattern.RewriteRuleSet([_FuseRotary().rule()], commute=True)
    rules.remove_unused_nodes = False  # nothing changes where nothing matches
    if not rules.apply_to_model(model):
        return False
    RemoveUnusedNodesPass()(model)
    return True


class _FuseRotary(pattern.RewriteRuleClassBase):  # type: ignore[misc] # it has no types
    """One rotary embedding: ``x [batch, heads, query, width]``, rotated by angles."""

    def __init__(self) -> None:
        super().__init__("FuseRotary", remove_nodes=False)  # the tables are shared by other layers
        self._tables: dict[tuple[str, ir.Value], ir.Value] = {}

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        """The formula; cosine and sine have an axis for the heads."""
        low = op.Slice(x, _allow_other_inputs=True, _outputs=["low"])
        high = op.Slice(x, _allow_other_inputs=True, _outputs=["high"])
        crossed = op.Concat(op.Neg(high), low, _outputs=["crossed"])
        return op.Add(op.Mul(x, cos), op.Mul(crossed, sin), _outputs=["rotated"])

    def check(
        self,
        context: Any,  # noqa: ARG002
        x: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        low: ir.Value,
        high: ir.Value,
        crossed: ir.Value,
        rotated: ir.Value,
        **_: Any,
    ) -> bool:
        """Whether halves, tables and dtypes are those of the runtime's operator."""
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return False
        width = x.shape[3]
        axis = crossed.producer().attributes["axis"].value  # type: ignore[union-attr]
        if width % 2 or axis not in (-1, 3) or rotated.is_graph_output():
            return False
        halves = [_slice_of(half, width) for half in (low, high)]
        tables = _table_of(cos, "Cos"), _table_of(sin, "Sin")
        return halves == [(0, width // 2), (width // 2, width)] and all(
            _fits(x, table) for table in tables
        )

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        """The runtime's operator, with tables that are made once."""
        # The tables are behind the ``Unsqueeze`` that `_table_of` found.
        tables: list[Any] = [value.producer().inputs[0] for value in (cos, sin)]  # type: ignore[union-attr]
        made = [self._once("rows", self._rows, op, tables[0])]
        made += [self._once("half", self._half, op, table) for table in tables]
        return op.RotaryEmbedding(x, *made, _domain=_DOMAIN, _version=1)

    def _once(self, kind: str, make: Any, op: Any, table: ir.Value) -> ir.Value:
        if (kind, table) not in self._tables:
            self._tables[kind, table] = make(op, table)
        return self._tables[kind, table]

    @staticmethod
    def _half(op: Any, table: ir.Value) -> Any:
        """``[batch * query, width / 2]`` of a table ``[batch, query, width]``."""
        half = int(table.shape[2]) // 2  # type: ignore[index, arg-type]
        start, end, axis, rows = (
            op.Constant(value_ints=ints) for ints in ([0], [half], [2], [-1, half])
        )
        return op.Reshape(op.Slice(table, start, end, axis), rows)

    @staticmethod
    def _rows(op: Any, table: ir.Value) -> Any:
        """``[batch, query]``: which row of the tables is that of each position."""
        sizes = op.Shape(table, start=0, end=2)
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        return op.Reshape(op.Range(zero, op.ReduceProd(sizes, keepdims=0), one), sizes)


def _slice_of(value: ir.Value, width: int) -> tuple[int, int] | None:
    """From where to where a ``Slice`` cuts the last of four axes."""
    inputs = value.producer().inputs  # type: ignore[union-attr]
    start, end, axis, step = (_numbers(number) for number in (*inputs[1:], None)[:4])
    if start is None or end is None or axis not in ([3], [-1]) or step not in (None, [1]):
        return None
    return start[0], min(end[0], width)


def _table_of(value: ir.Value, function: str) -> ir.Value | None:
    """The ``[batch, query, width]`` behind a table with heads, if its two halves are equal."""
    with_heads = _made_by(value, "Unsqueeze")
    if with_heads is None or _numbers(with_heads.inputs[1]) != [1]:
        return None
    table = factor = with_heads.inputs[0]
    while (node := _made_by(factor, "Mul", "Cast")) is not None:  # scaled, or of another precision
        scales = [one for one in node.inputs if one is not None and one.const_value is not None]
        if node.op_type == "Cast":
            factor = node.inputs[0]
        elif len(scales) == 1 and scales[0].const_value.size == 1:  # type: ignore[union-attr]
            factor = node.inputs[1 - node.inputs.index(scales[0])]
        else:
            return None
    angles = _made_by(factor, function)
    joined = _made_by(angles.inputs[0], "Concat") if angles is not None else None
    if joined is None or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    return table if joined.attributes["axis"].value in (-1, 2) else None


def _fits(x: ir.Value, table: ir.Value | None) -> bool:
    """Whether a table has the rows, queries and width of x, and both are in float32."""
    if table is None or table.shape is None or x.shape is None:
        return False
    batch, _, query, width = x.shape
    float32 = x.dtype == table.dtype == ir.DataType.FLOAT
    return float32 and list(table.shape) == [batch, query, width]


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes the value, if it is one of these operators of ONNX."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and not node.domain else None


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(number) for number in np.ravel(tensor.numpy())]
