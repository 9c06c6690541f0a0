"""Run a part with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.session.adapter_slots import run_module
from qeff_proxy.session.axes import size_of
from qeff_proxy.session.session import Session
from qeff_proxy.tensor_names import PAST

if TYPE_CHECKING:
    from qeff_proxy.parts import Part, TensorSpec


class TorchSession(Session):
    """Runs a live part with PyTorch.

    Args:
        part: The part; its module is used as it is, on the device it is on.
    """

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._module = part.module.eval()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `Session.run`).

        Inputs may be missing: the exported part lacks those that the trace found useless.
        """
        self.check_open()
        return self.compute(feeds, {})

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        """Run the module, with ones for the inputs that are missing."""
        tensors = {name: to_tensor(value) for name, value in feeds.items()}
        for spec in self.part.inputs:
            if spec.name not in tensors:
                tensors[spec.name] = _placeholder(spec, self.part.inputs, tensors)
        outputs = run_module(self._module, tensors)
        # No output may share memory with inputs, weights or another output.
        held = (*tensors.values(), *self._module.parameters(), *self._module.buffers())
        taken = {value.untyped_storage().data_ptr() for value in held}
        return {name: to_array(_owned(value, taken)) for name, value in outputs.items()}

    def release(self) -> None:
        """Let go of the module and its weights."""
        del self._module, self.part


def _owned(value: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """``value``, or a copy if its memory is taken; adds its memory to what is taken."""
    if value.untyped_storage().data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def _placeholder(
    spec: TensorSpec, inputs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Ones for an input without influence, of the sizes that the other inputs have."""
    batch, query = next(iter(tensors.values())).shape[:2]
    sizes = {"batch": batch, "query": query, "sequence": query, "past": 0}
    for other in inputs:
        if other.name.startswith(PAST) and "past" in other.shape and other.name in tensors:
            sizes["past"] = tensors[other.name].shape[other.shape.index("past")]
    shape = [size_of(axis, sizes) for axis in spec.shape]
    return torch.ones(shape, dtype=getattr(torch, spec.dtype))
