"""Run a part with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.session.axes import size_of
from qeff_proxy.session.session import Session

if TYPE_CHECKING:
    from qeff_proxy.parts import Part


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
                tensors[spec.name] = _placeholder(spec.shape, spec.dtype, tensors)
        with torch.no_grad():
            outputs = self._module(
                **{name.replace(".", "__"): value for name, value in tensors.items()}
            )
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
    shape: tuple[int | str, ...], dtype: str, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Ones for an input without influence, of the sizes that the other inputs have."""
    first = next(iter(tensors.values()))
    past = tensors.get("past_key_values.0.key")
    batch, query = first.shape[:2]
    length = 0 if past is None else past.shape[2]
    sizes = {"batch": batch, "query": query, "sequence": query, "past": length}
    return torch.ones([size_of(axis, sizes) for axis in shape], dtype=getattr(torch, dtype))
