"""Places for the A and B of LoRA adapters in a model, filled when it runs.

A linear module with places computes ``W x + B A x``, as peft does before it merges; places are
zeros, which is the base model. They are named as peft names the tensors of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qeff_proxy.tensor_names import ADAPTER

#: Modules by the names of their classes that have places, and the axis of their inputs.
_LINEAR = {"Linear": 1, "Conv1D": 0}


class AdapterSlot(nn.Module):
    """The place of an A, ``[rank, in]``, or a B, ``[out, rank]``."""

    def __init__(self, name: str, weight: torch.Tensor) -> None:
        super().__init__()
        self.names = [name]  # no text: layers whose modules hold different texts are not alike
        self.weight: torch.Tensor
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the place's tensor."""
        return nn.functional.linear(x, self.weight)


class _Adapted(nn.Module):
    """Comes before the class of a linear module among the bases of its new class."""

    lora_A: AdapterSlot  # noqa: N815 (peft's names)
    lora_B: AdapterSlot  # noqa: N815

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the linear module gives, plus what the adapter does."""
        result: torch.Tensor = super().forward(x)
        return result + self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]


def add_slots(model: nn.Module, shapes: Mapping[str, tuple[int, int, int]]) -> str | None:
    """Make places in a model.

    Args:
        model: Its linear modules are changed in place.
        shapes: Path of each of them → rank, inputs and outputs.

    Returns:
        Why there can be none, where a module is not there or of another kind or shape.
    """
    modules = dict(model.named_modules())
    for path, (rank, width, height) in shapes.items():
        module = modules.get(path)
        kind = type(module)
        if module is None or kind.__name__ not in _LINEAR:
            what = "does not have" if module is None else f"has as a {kind.__name__}"
            return f"{path}, which {type(model).__name__} {what}"
        weight: Any = module.weight
        axis = _LINEAR[kind.__name__]
        if (weight.shape[axis], weight.shape[1 - axis]) != (width, height):
            return f"{path} with {width} inputs and {height} outputs, unlike the model's"
        for name, shape in zip(ADAPTER, ((rank, width), (height, rank)), strict=True):
            zeros = torch.zeros(shape, dtype=weight.dtype)
            setattr(module, name.split(".")[1], AdapterSlot(f"{path}{name}", zeros))
        module.__class__ = type(kind.__name__, (_Adapted, kind), {})
    return None


def slots_in(module: nn.Module) -> dict[str, AdapterSlot]:
    """The places in a module, by the names of their tensors in the model."""
    return {one.names[0]: one for one in module.modules() if isinstance(one, AdapterSlot)}


def run_module(module: nn.Module, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a part's module on its inputs and on the tensors of an adapter."""
    slots = slots_in(module)
    for name in slots.keys() & feeds.keys():
        slots[name].weight = feeds[name]
    others = {n.replace(".", "__"): tensor for n, tensor in feeds.items() if n not in slots}
    with torch.no_grad():
        outputs: dict[str, torch.Tensor] = module(**others)
    return outputs
