"""Keeps graphs of fixed shapes free of what NPU compilers refuse, or compute wrongly.

Each pass is a function that changes a graph in place and leaves what it computes as it is. None of
them knows a model: they know operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PASSES", "clean_graph", "constants_of", "put_constants_last"]

_COMMUTATIVE = {"Add", "Mul"}


def constants_of(graph: ir.Graph) -> set[ir.Value]:
    """Every value that depends on no input: initializers, and what is computed of them alone."""
    found = set(graph.initializers.values())
    for node in graph:
        if all(value is None or value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def put_constants_last(graph: ir.Graph) -> None:
    """Write ``x * constant`` instead of ``constant * x``, and so for sums.

    The Qualcomm compiler takes ``weight * (x * rsqrt(…))`` for a pattern of its own, and then
    fails to finalize the graph (error 1002); the same with the weight behind compiles.
    """
    constants = constants_of(graph)
    for node in graph:
        if node.op_type in _COMMUTATIVE and node.domain == "":
            first, second = node.inputs
            if first in constants and second not in constants:
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)


#: In the order in which they run.
PASSES: tuple[Callable[[ir.Graph], None], ...] = (put_constants_last,)


def clean_graph(model: ir.Model) -> None:
    """Run all passes on a graph of fixed shapes, in place."""
    for run_pass in PASSES:
        run_pass(model.graph)
