"""onnxscript's optimizer, at less than half of its cost.

``onnxscript.optimizer.optimize`` tries each of its rules on every node, and one of them searches
the whole graph each time: its cost grows with the square of the number of nodes. Nearly every rule
matches patterns that end with an operator of one type; here it is tried on nodes of that type only.
The passes, the rules, their order and the result are those of onnxscript.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter

from qeff_proxy.common.private_names import FOLDING, find, matched_operator

_MOST_TURNS = 2


def fold_graph(model: ir.Model, *, input_size_limit: int, output_size_limit: int) -> None:
    """Infer shapes, fold constants and simplify, in place.

    Args:
        model: The model.
        input_size_limit: Nodes with an input of more bytes are not folded.
        output_size_limit: Nor are those whose result would have more bytes.
    """
    limits = {"input_size_limit": input_size_limit, "output_size_limit": output_size_limit}
    names = find(FOLDING)
    if names is None:
        optimizer.optimize(model, num_iterations=_MOST_TURNS, **limits)
        return
    passes.InlinePass()(model)
    rules = rewriter.RewritePass(rewriter.RewriteRuleSet([_narrowed(one) for one in names.rules]))
    clean = ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    )
    for _ in range(_MOST_TURNS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True, **limits)
        changed = [folded.modified, rules(model).modified, clean(model).modified]
        if not any(changed):
            break
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


class _RuleOfOperator(rewriter.RewriteRule):  # type: ignore[misc]
    """A rule that is tried only on nodes of the operator type that its pattern ends with.

    Args:
        rule: The rule.
        op_type: The operator's type.
    """

    def __init__(self, rule: rewriter.RewriteRule, op_type: str) -> None:
        self.__dict__.update(vars(rule))
        self._op_type = op_type

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        """As the rule does."""
        if node.op_type != self._op_type:
            return None
        return super().try_rewrite(model, graph, node, **options)


def _narrowed(rule: rewriter.RewriteRule) -> rewriter.RewriteRule:
    op_type = matched_operator(rule)
    return rule if op_type is None else _RuleOfOperator(rule, op_type)
