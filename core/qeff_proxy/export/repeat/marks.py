"""Marks around layers in a trace, and placeholders for layers that are not traced.

`enter` and `leave` return their inputs: what lies between two marks with the same number was
traced for one layer. `layer` is a placeholder for a layer whose trace would be the same. In the
ONNX graph each is one node of the domain `DOMAIN`;
`qeff_proxy.export.repeat.clone_layers` replaces them all before a graph is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Domain of the nodes in the ONNX graph.
DOMAIN = "qeff_proxy"


def enter(values: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """Return copies of a layer's inputs; in a trace, mark where the layer begins."""
    if not torch.compiler.is_compiling():
        return [value.clone() for value in values]
    return _node("enter", values, values, number=number)


def leave(values: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """Return copies of a layer's outputs; in a trace, mark where the layer ends."""
    if not torch.compiler.is_compiling():
        return [value.clone() for value in values]
    return _node("leave", values, values, number=number)


def layer(
    values: Sequence[torch.Tensor], like: Sequence[torch.Tensor], number: int, template: int
) -> list[torch.Tensor]:
    """A placeholder for a layer, with outputs of the shapes and dtypes of ``like``.

    Args:
        values: The layer's inputs, in the order of ``enter`` for ``template``.
        like: The outputs of ``leave`` for ``template``.
        number: Number of this call.
        template: Number of the call that was traced.

    Returns:
        In a run, random numbers that differ from those of any other call.
    """
    if torch.compiler.is_compiling():
        return _node("layer", [*values, *like], like, number=number, template=template)
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else torch.zeros_like(value)
        for value in like
    ]


def _node(
    kind: str, inputs: Sequence[torch.Tensor], like: Sequence[torch.Tensor], **attributes: int
) -> list[torch.Tensor]:
    """One node of the ONNX graph, with outputs of the shapes and dtypes of ``like``."""
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{kind}",
        inputs,
        dict(attributes),
        dtypes=[value.dtype for value in like],
        shapes=[value.shape for value in like],
        version=1,
    )
    return list(outputs)
