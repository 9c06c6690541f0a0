"""What a trace makes of operators that ONNX lacks, and of experts in a loop, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from qeff_proxy.export.trace.trace_part import trace_part
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.families.operators import ReplacedOperators
from qeff_proxy.parts import Part, TensorSpec
from torch import nn
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE


def traced(module: nn.Module, width: int, rows: Any) -> tuple[set[str], Any]:
    """The operators of a module's graph, and what the graph makes of ``rows``."""
    spec = TensorSpec("inputs_embeds", "float32", ("batch", "query", width))
    part = Part("body", module, (spec,), (TensorSpec("out", "float32", spec.shape),), "body")
    graph = trace_part(part, {}, None, repeat=False)
    for name, tensor in graph.weights.items():
        value = graph.model.graph.initializers[name]
        value.const_value = ir.tensor(tensor.detach().numpy(), name=name)
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    operators = {node.op_type for node in graph.model.graph}
    return operators, session.run(None, {"inputs_embeds": rows})[0]


class _Module(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.inner(inputs_embeds)}


class _Sparse(nn.Module):
    """The activation of Gemma 3n."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        share = torch.tensor(0.95, dtype=torch.float32)
        with ReplacedOperators():
            cutoff = torch.distributions.normal.Normal(0, 1).icdf(share)
        return nn.functional.relu(inputs - inputs.std(-1, keepdim=True) * cutoff)


def test_the_inverse_error_function_is_that_of_torch() -> None:
    y = torch.cat([torch.linspace(-0.999, 0.999, 41), torch.tensor([0.0, 0.99999, -1e-4])])
    with ReplacedOperators():
        actual = torch.erfinv(y), y.erfinv()
    for one in actual:
        torch.testing.assert_close(one, torch.erfinv(y), rtol=1e-6, atol=1e-7)


def test_a_quantile_is_a_constant_of_the_graph() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    module = _Module(_Sparse())
    operators, actual = traced(module, 64, rows)
    assert not operators & {"Erf", "Log"}
    expected = module(torch.from_numpy(rows))["out"].numpy()
    assert (expected > 0).any()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_traced_loop_over_experts_looks_for_no_tokens() -> None:
    """One that asks how many tokens an expert has cannot be traced otherwise."""
    config = LongcatFlashConfig(
        hidden_size=16,
        expert_ffn_hidden_size=8,
        n_routed_experts=3,
        zero_expert_num=2,
        moe_topk=2,
    )
    layer = LongcatFlashMoE(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    rows = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    operators, actual = traced(_Module(experts_in_turn(layer)), 16, rows)
    assert "NonZero" not in operators
    with torch.no_grad():
        expected = layer(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
