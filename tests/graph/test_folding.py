"""Graphs are folded as onnxscript folds them, with less work."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
from onnx import parser
from qeff_proxy.graph import folding
from qeff_proxy.graph.folding import fold_graph

#: Rules apply to most of these lines.
GRAPH = """
<ir_version: 10, opset_import: ["": 18]>
folded (float[2,3,8] x, float[4] b) => (float[2,3,4] a, float[2,3,4] c, float[2,3,8] d,
                                        float[6,8] e, float[2,3,8] f, float[2,3,8] g)
<float one = {1}, float zero = {0}, int64[1] low = {0}, int64[1] mid = {4},
 int64[1] high = {8}, int64[1] last = {2}, int64[3] same = {2, 3, 8}, int64[2] flat = {6, 8},
 int64[3] other = {3, 2, 8}>
{
    a = Slice(x, low, mid, last)
    c = Slice(x, mid, high, last)
    scaled = Mul(one, x)
    moved = Add(scaled, zero)
    d = Expand(moved, same)
    turned = Reshape(x, other)
    e = Reshape(turned, flat)
    back = Transpose <perm = [1, 0, 2]> (x)
    f = Transpose <perm = [1, 0, 2]> (back)
    half = Cast <to = 1> (x)
    g = Relu(half)
}
"""
LIMITS = {"input_size_limit": 1024, "output_size_limit": 1 << 20}


def make_model() -> ir.Model:
    proto = parser.parse_model(GRAPH)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def test_rules_apply_as_in_onnxscript() -> None:
    ours, theirs = make_model(), make_model()
    fold_graph(ours, **LIMITS)
    onnxscript.optimizer.optimize(theirs, **LIMITS)
    assert ir.to_proto(ours) == ir.to_proto(theirs)
    left = [node.op_type for node in ours.graph]
    assert left == ["Slice", "Slice", "Identity", "Reshape", "Identity", "Relu"]


def test_a_rule_sees_no_operator_but_its_own(monkeypatch: Any) -> None:
    seen = []
    plain = folding.rewriter.RewriteRule.try_rewrite

    def note(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        seen.append((rule, node.op_type))
        return plain(rule, model, graph, node, **options)

    monkeypatch.setattr(folding.rewriter.RewriteRule, "try_rewrite", note)
    fold_graph(make_model(), **LIMITS)
    tried = len(seen)
    seen.clear()
    onnxscript.optimizer.optimize(make_model(), **LIMITS)
    assert 0 < tried < len(seen) / 5
