"""PyTorch with the rounding of a lower precision: what a healthy backend's errors look like.

`RoundedModule` runs a float32 module and rounds what each operator computes to the precision's
significant bits. So no second model is in memory, and no code of a model meets a dtype that it or
PyTorch's CPU kernels lack. Sums inside one operator are float32's, as in accelerators, which
accumulate wider than they store.

Only the bits are those of the precision, not its range: a backend whose numbers overflow or
underflow where float32's do not is to fail.

Values that depend on whole numbers only (rotary angles, position tables) are computed exactly and
rounded where they meet the hidden states: backends compute them on the host or keep tables of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

#: Significant bits of the precisions that can be simulated, the leading one included.
BITS: Mapping[str, int] = {"float16": 11, "bfloat16": 8}
_FLOAT32_BITS = 24
_BLOCK = (
    1 << 18
)  # elements: one copy of a large weight in memory, not three, and five times as fast


def round_to(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 elements to so many significant bits; those near float32's end are kept.

    Veltkamp's splitting: T. J. Dekker, "A floating-point technique for extending the available
    precision", Numerische Mathematik 18 (1971).
    """
    rounded = torch.empty_like(tensor)
    if tensor.dim() == 0 or tensor.numel() == 0:
        _round_piece(tensor, rounded, bits)
        return rounded
    dim = max(range(tensor.dim()), key=tensor.stride)
    rows = max(1, _BLOCK * tensor.shape[dim] // tensor.numel())
    for piece, place in zip(
        torch.split(tensor, rows, dim), torch.split(rounded, rows, dim), strict=True
    ):
        _round_piece(piece, place, bits)
    return rounded


def _round_piece(tensor: torch.Tensor, rounded: torch.Tensor, bits: int) -> None:
    scaled = tensor * (2.0 ** (_FLOAT32_BITS - bits) + 1)
    torch.sub(scaled, tensor, out=rounded)
    torch.sub(scaled, rounded, out=rounded)
    if not rounded.sum().isfinite():
        rounded.copy_(torch.where(scaled.isfinite(), rounded, tensor))


class RoundedModule(nn.Module):
    """Runs a module with its operators' results rounded; it holds the module's own weights."""

    def __init__(self, module: nn.Module, bits: int) -> None:
        super().__init__()
        self.module = module
        self.bits = bits

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Call the module with rounded inputs."""
        rounding = _Rounding(self.bits)
        inputs = {name: rounding.rounded(tensor) for name, tensor in tensors.items()}
        # Of PyTorch's attention kernels this one is made of operators that are rounded one by one.
        with sdpa_kernel(SDPBackend.MATH), rounding:
            return self.module(**inputs)  # type: ignore[no-any-return]


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the results of operators with a rounded input, and their other inputs."""

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bits = bits

    def rounded(self, value: Any) -> Any:
        """A float32 tensor rounded and marked as such; anything else unchanged."""
        if not _is_float(value) or _is_rounded(value):
            return value
        return _marked(round_to(value, self._bits))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        leaves: list[Any] = []
        tree_map(leaves.append, (args, kwargs))
        if not any(_is_rounded(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        returned = [item.alias_info for item in func._schema.returns]  # noqa: SLF001
        written = any(alias is not None and alias.is_write for alias in returned)
        if not written:
            args, kwargs = tree_map(self.rounded, (args, kwargs))
        results = func(*args, **kwargs)
        if written:
            for result in results if isinstance(results, tuple | list) else (results,):
                if _is_float(result):
                    _marked(result.copy_(round_to(result, self._bits)))
            return results
        if any(alias is not None for alias in returned):  # a view of what is rounded
            return tree_map(lambda r: _marked(r) if _is_float(r) else r, results)
        return tree_map(self.rounded, results)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_rounded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "rounded", False)


def _marked(tensor: torch.Tensor) -> torch.Tensor:
    tensor.rounded = True  # type: ignore[attr-defined]
    return tensor
