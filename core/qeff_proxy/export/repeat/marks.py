"""Operators that mark layers in a trace, and stand for layers that are not traced.

`enter` and `leave` give what they are given: what lies between the two of one number was traced
for one layer. `layer` stands for a layer that would trace like that one. None of them is left in a
graph that is written: `qeff_proxy.export.repeat.clone_layers` puts nodes in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter import _core

__all__ = ["DOMAIN", "TRANSLATIONS", "enter", "layer", "leave"]

#: Domain of the nodes in the ONNX graph.
DOMAIN = "qeff_proxy"


@torch.library.custom_op(f"{DOMAIN}::enter", mutates_args=())
def enter(values: list[torch.Tensor], number: int) -> list[torch.Tensor]:  # noqa: ARG001
    """What a layer is given, as it comes."""
    return [value.clone() for value in values]


@torch.library.custom_op(f"{DOMAIN}::leave", mutates_args=())
def leave(values: list[torch.Tensor], number: int) -> list[torch.Tensor]:  # noqa: ARG001
    """What a layer gives, as it is."""
    return [value.clone() for value in values]


@torch.library.custom_op(f"{DOMAIN}::layer", mutates_args=())
def layer(
    values: list[torch.Tensor],  # noqa: ARG001
    like: list[torch.Tensor],
    number: int,
    template: int,  # noqa: ARG001
) -> list[torch.Tensor]:
    """Stands for a layer in a trace: it gives tensors of the shapes of ``like``.

    Args:
        values: What the layer is given, in the order of ``enter`` for ``template``.
        like: What ``leave`` gave for ``template``.
        number: Of this call.
        template: Number of the call that was traced.

    Returns:
        In a run, random numbers that no other call gives.
    """
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else torch.zeros_like(value)
        for value in like
    ]


def _same(values: list[torch.Tensor], number: int) -> list[torch.Tensor]:  # noqa: ARG001
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


enter.register_fake(_same)
leave.register_fake(_same)


@layer.register_fake
def _like(
    values: list[torch.Tensor],  # noqa: ARG001
    like: list[torch.Tensor],
    number: int,  # noqa: ARG001
    template: int,  # noqa: ARG001
) -> list[torch.Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in like]


def _node(kind: str, inputs: Sequence[ir.Value], outputs: int, **attributes: int) -> Any:
    tracer = _core.current_tracer
    assert tracer is not None  # noqa: S101 (called by the exporter alone)
    node = ir.Node(
        DOMAIN,
        kind,
        list(inputs),
        [ir.AttrInt64(name, value) for name, value in attributes.items()],
        num_outputs=outputs,
        version=1,
    )
    tracer.nodes.append(node)
    return node.outputs


def _enter(values: Sequence[ir.Value], number: int) -> Any:
    return _node("enter", values, len(values), number=number)


def _leave(values: Sequence[ir.Value], number: int) -> Any:
    return _node("leave", values, len(values), number=number)


def _layer(values: Sequence[ir.Value], like: Sequence[ir.Value], number: int, template: int) -> Any:
    return _node("layer", [*values, *like], len(like), number=number, template=template)


#: How the exporter writes them.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.qeff_proxy.enter.default: _enter,
    torch.ops.qeff_proxy.leave.default: _leave,
    torch.ops.qeff_proxy.layer.default: _layer,
}
