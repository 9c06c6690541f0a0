"""onnxscript's optimizer, at less than half of its cost.

``onnxscript.optimizer.optimize`` tries each of its rules on every node, and for one of them looks
through the whole graph each time. Nearly every rule ends with an operator of a certain type; here
it is tried on nodes of that type alone. Passes, rules and their order are otherwise those of
onnxscript, and what comes out is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter

__all__ = ["fold_graph"]

_MOST_TURNS = 2


def fold_graph(model: ir.Model, *, input_size_limit: int, output_size_limit: int) -> None:
    """Infer shapes, fold constants and simplify, in place.

    Args:
        model: The model.
        input_size_limit: Nodes with an input of more bytes are not folded.
        output_size_limit: Nor are those whose result would have more bytes.
    """
    passes.InlinePass()(model)
    rules = rewriter.RewritePass(rewriter.RewriteRuleSet(list(_rules())))
    clean = ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    )
    for _ in range(_MOST_TURNS):
        folded = optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=input_size_limit,
            output_size_limit=output_size_limit,
        )
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
    """A rule that is only tried on nodes of the operator type that its pattern ends with.

    Args:
        rule: The rule, which this one is otherwise.
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


def _rules() -> Iterator[rewriter.RewriteRule]:
    for rule in rewriter._DEFAULT_REWRITE_RULES:  # noqa: SLF001 (the optimizer's own)
        ends = rule._target_pattern.output_nodes  # noqa: SLF001 (nothing else says what it ends with)
        op_type = ends[0].op_type
        # What is no name is a pattern of names.
        yield _RuleOfOperator(rule, op_type) if op_type.isidentifier() else rule
