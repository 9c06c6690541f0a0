"""Graphs are brought to ONNX's operators in place, and by PyTorch where that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from qeff_proxy.export.trace.decompose_in_place import lowered_in_place
from qeff_proxy.export.trace.operator_table import operators_read_once
from torch import nn
from torch.onnx._internal.exporter import _core


class Function(nn.Module):
    """A module that is a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def exported(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, bool]:
    """ONNX Runtime's largest difference to PyTorch at another size; whether it was lowered."""
    module = Function(function).eval()
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with operators_read_once(), lowered_in_place() as lowering:
            program = torch.onnx.export(
                module, (torch.randn(3, 4, 6),), dynamic_shapes=sizes, dynamo=True, verbose=False
            )
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = torch.randn(5, 4, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    expected = function(given).numpy()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return np.abs(found.astype(np.float64) - expected).max(), lowering.done


def views(x: torch.Tensor) -> torch.Tensor:
    first, second = x.transpose(1, 2).contiguous().chunk(2, dim=1)
    joined = torch.cat([second.flatten(1), first.reshape(x.shape[0], -1)], 1)
    return joined.view(x.shape[0], 6, 4).flatten(0, 1) + nn.functional.dropout(x, 0.5, False).sum()


def dtypes(x: torch.Tensor) -> torch.Tensor:
    mask = x > 0
    counts = mask.to(torch.int64).sum(-1, keepdim=True)
    return (x.to(torch.float32) * counts + mask * 2).to(torch.float64) + counts


def written(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y + 1
    y.add_(x)
    y.clamp_(0, 3)
    return y * z


def minima(x: torch.Tensor) -> torch.Tensor:
    return torch.min(x, x.mean(dtype=torch.float64) + x.new_zeros((), dtype=torch.int64))


def convolutions(x: torch.Tensor) -> torch.Tensor:
    weight = torch.arange(48.0).view(4, 2, 2, 3) / 48
    image = x.reshape(-1, 2, 2, 6)
    once = nn.functional.conv2d(image, weight, padding="valid")
    return nn.functional.conv2d(image, weight, None, 2, "valid", (1, 2)).sum() + once


def normalized_weights(x: torch.Tensor) -> torch.Tensor:
    direction, length = torch.arange(1.0, 25.0).view(4, 3, 2).sin(), torch.arange(1.0, 3.0)
    weight = torch._weight_norm(direction, length.view(1, 1, 2), 2)
    first = torch._weight_norm(direction, torch.arange(1.0, 5.0).view(4, 1, 1))
    return x.flatten(1) @ torch.cat([weight, first]).reshape(24, 2)


def pooled(x: torch.Tensor) -> torch.Tensor:
    image = x.reshape(-1, 2, 2, 6)
    once = nn.functional.interpolate(image, size=(1, 3), mode="area")
    return once * nn.functional.adaptive_avg_pool2d(image[0], (2, 3)).sum()


@pytest.mark.parametrize(
    "function", [views, dtypes, written, minima, convolutions, normalized_weights, pooled]
)
def test_a_graph_of_known_operators_is_lowered_in_place(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    difference, lowered = exported(function)
    assert lowered
    assert difference < 1e-5


def written_through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    view = y[:, :1]
    y.add_(1)
    return view * y


def written_into_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.reshape(-1, 24).mul_(3)
    return y


def pooled_unequally(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.adaptive_avg_pool2d(x, (3, 4))


@pytest.mark.parametrize(
    "function", [written_through_a_view, written_into_a_view, pooled_unequally]
)
def test_pytorch_decomposes_the_rest(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    difference, lowered = exported(function)
    assert not lowered
    assert difference < 1e-5


def test_pytorch_is_as_before_afterwards() -> None:
    before = _core._prepare_exported_program_for_export
    with lowered_in_place():
        assert _core._prepare_exported_program_for_export is not before
    assert _core._prepare_exported_program_for_export is before
