"""Run a part with PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from qeff_proxy.arrays import to_array, to_tensor
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.parts import Part

__all__ = ["TorchSession"]


class TorchSession:
    """Runs a live part with PyTorch.

    Args:
        part: The part; its module is used as it is, on the device it is on.
    """

    def __init__(self, part: Part) -> None:
        self._part: Part | None = part
        part.module.eval()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        if self._part is None:
            raise BackendError("the session is closed")
        tensors = {name: to_tensor(value) for name, value in feeds.items()}
        for spec in self._part.inputs:
            # What the trace found useless is no input of the exported part.
            if spec.name not in tensors:
                tensors[spec.name] = _placeholder(spec.shape, spec.dtype, tensors)
        with torch.no_grad():
            outputs = self._part.module(
                **{name.replace(".", "__"): value for name, value in tensors.items()}
            )
        taken = {value.untyped_storage().data_ptr() for value in _held(self._part, tensors)}
        return {name: to_array(_owned(value, taken)) for name, value in outputs.items()}

    def close(self) -> None:
        """Let go of the part."""
        self._part = None


def _held(part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    """What an output must not share memory with: inputs and weights."""
    return (*tensors.values(), *part.module.parameters(), *part.module.buffers())


def _owned(value: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """``value``, or a copy where its memory belongs to something else; its memory is then taken."""
    if value.untyped_storage().data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def _placeholder(
    shape: tuple[int | str, ...], dtype: str, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A tensor for an input that has no influence: ones of the axes the other inputs show."""
    first = next(iter(tensors.values()))
    past = tensors.get("past_key_values.0.key")
    sizes = {"batch": first.shape[0], "query": first.shape[1], "past": 0}
    sizes["sequence"] = sizes["query"]
    if past is not None:
        sizes["past"] = past.shape[2]
    sizes["past + query"] = sizes["past"] + sizes["query"]
    axes = [axis if isinstance(axis, int) else sizes[axis] for axis in shape]
    return torch.ones(axes, dtype=getattr(torch, dtype))
