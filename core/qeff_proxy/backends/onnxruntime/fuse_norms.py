"""Norms in the form that ONNX Runtime fuses.

An exported RMSNorm multiplies by ``Reciprocal(Sqrt(…))``, which accelerators' compilers want. ONNX
Runtime has one kernel for the whole norm, but looks for a division by ``Sqrt(…)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxscript.rewriter import pattern

if TYPE_CHECKING:
    import onnx_ir as ir


def divide_in_norms(model: ir.Model) -> bool:
    """Turn ``x * Reciprocal(Sqrt(y))`` into ``x / Sqrt(y)``.

    Returns:
        Whether there was any; otherwise nothing was changed.
    """
    return bool(pattern.RewriteRule(_product, _quotient).apply_to_model(model, commute=True))


def _product(op: Any, x: Any, y: Any) -> Any:
    return op.Mul(x, op.Reciprocal(op.Sqrt(y)))


def _quotient(op: Any, x: Any, y: Any) -> Any:
    return op.Div(x, op.Sqrt(y))
