"""Operators that mark layers in a trace, and placeholders for layers that are not traced.

`enter` and `leave` return their inputs: the nodes between the two of one number belong to one
layer. `layer` is a placeholder for a layer that would trace like that one.
`qeff_proxy.export.repeat.clone_layers` replaces all of them before a graph is written.
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
    """The inputs of a layer."""
    return [value.clone() for value in values]


@torch.library.custom_op(f"{DOMAIN}::leave", mutates_args=())
def leave(values: list[torch.Tensor], number: int) -> list[torch.Tensor]:  # noqa: ARG001
    """The outputs of a layer."""
    return [value.clone() for value in values]


@torch.library.custom_op(f"{DOMAIN}::layer", mutates_args=())
def layer(
    values: list[torch.Tensor],  # noqa: ARG001
    like: list[torch.Tensor],
    number: int,
    template: int,  # noqa: ARG001
) -> list[torch.Tensor]:
    """A placeholder for a layer, with outputs of the shapes of ``like``.

    Args:
        values: The layer's inputs, in the order of ``enter`` for ``template``.
        like: The outputs of ``leave`` for ``template``.
        number: Of this call.
        template: Number of the call that was traced.

    Returns:
        In a run, random numbers that differ from those of any other call.
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


#: How the exporter translates them.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.qeff_proxy.enter.default: _enter,
    torch.ops.qeff_proxy.leave.default: _leave,
    torch.ops.qeff_proxy.layer.default: _layer,
}
