"""Experts that a model loops over as its router has chosen them, made to be traced.

Such a loop asks for the tokens of each expert, whose number a trace does not know. Instead, each
expert runs on all tokens, and the router's weights of the others are zero. Experts that
transformers runs by a function of its own need none of this.

Some routers also convert a module of theirs to another dtype at each run, for good; a copy converts
the weights alone, and only for the run.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.layers.replace_modules import replace_modules

#: What a loop over chosen experts calls.
_LOOP = {"nonzero", "where", "index_add_"}
_ARGUMENTS = 3  # hidden states, the experts of each token, their weights
_WHERE = torch.where  # as modes see it: exporters put a function of their own in its place


def experts_in_turn(model: ModuleT) -> ModuleT:
    """``model``, or a copy of it whose experts all run, one after another, on all tokens."""
    loops: dict[str, nn.Module] = {
        path: _EachExpert(module)
        for path, module in model.named_modules()
        if set(getattr(getattr(_loop_of(module), "__code__", None), "co_names", ())) >= _LOOP
        and len(inspect.signature(module.forward).parameters) == _ARGUMENTS
    }
    return replace_modules(kept_dtypes(model), loops) if loops else model


def _loop_of(module: nn.Module) -> Any:
    """What a module runs; transformers may put a function around its loop, and run that or it."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    forward = type(module).forward
    return inspect.unwrap(forward) if implementation == "eager" else forward


def has_experts_in_turn(module: nn.Module) -> bool:
    """Whether `experts_in_turn` changed a part of it: it rounds as other operations do."""
    return any(isinstance(one, _EachExpert) for one in module.modules())


def kept_dtypes(model: ModuleT) -> ModuleT:
    """``model``, or a copy of it whose runs convert no module of it for good."""
    converted: dict[str, nn.Module] = {
        f"{path}.{name}".lstrip("."): _Converted(module.get_submodule(name))
        for path, module in model.named_modules()
        for name in _exchanged(module)
    }
    return replace_modules(model, converted) if converted else model


def _exchanged(module: nn.Module) -> Iterator[str]:
    """Names of the children that a module puts in their place, converted, as it runs."""
    children = {name for name, _ in module.named_children()}
    own = {n: inspect.unwrap(m) for n, m in vars(type(module)).items() if inspect.isfunction(m)}
    runs = ["forward"] if children and "forward" in own else []
    for name in runs:  # which grows: what is not run, such as a change of sizes, does not count
        code = own[name].__code__
        runs += [other for other in code.co_names if other in own and other not in runs]
        if "to" in code.co_names:
            written = {at.argval for at in dis.get_instructions(code) if at.opname == "STORE_ATTR"}
            yield from sorted(written & children)


class _Converted(nn.Module):
    """A module that is converted to another dtype by a run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.dtype: torch.dtype | None = None

    def to(self, dtype: torch.dtype) -> _Converted:  # type: ignore[override]
        """Itself; its weights have another dtype in the next run."""
        self.dtype = dtype
        return self

    def forward(self, hidden: torch.Tensor) -> Any:
        """What the module makes of ``hidden`` with its weights in that dtype."""
        weights = {name: weight.to(self.dtype) for name, weight in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, (hidden,))


class _EachExpert(nn.Module):
    """Runs the loop once for each expert, as if it alone had been chosen, by all tokens."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        sizes = [size for name, size in vars(experts).items() if "experts" in name]
        self.count = max(size for size in sizes if isinstance(size, int))

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden [‥, width]``; of each token the numbers and the weights ``[tokens, top]``.

        Some give ``chosen`` as ``[tokens, top, experts]``, 1 for an expert that is chosen.
        """
        total = torch.zeros_like(hidden)
        encoded = chosen.dim() == weights.dim() + 1
        for expert in range(self.count):
            mine = chosen[..., expert] if encoded else chosen == expert
            share = (weights * mine.to(weights.dtype)).sum(-1, keepdim=True)
            one = chosen[:, :1] if encoded else torch.full_like(chosen[:, :1], expert)
            # A second place of no weight: some squeeze the axis of the places.
            one, share = torch.cat([one, one], 1), nn.functional.pad(share, (0, 1))
            with _Alone(expert):
                total = total + self.experts(hidden, one, share)
        return total


class _Number(list[int]):
    """The row of an expert in what ``nonzero`` returns."""

    def item(self) -> int:
        """The number in it."""
        return self[0]


class _Alone(TorchFunctionMode):
    """Lets a loop find one expert, and all tokens for it."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert
        self.tokens: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.nonzero, torch.nonzero):
            return [_Number([self.expert])]
        if func is _WHERE and len(args) == 1:
            self.tokens = args[0][-1]  # of their number; only known by what it is
            return 0, self.tokens
        if self.tokens is not None and func is torch.Tensor.index_add_ and args[2] is self.tokens:
            return args[0].add_(args[3])
        if self.tokens is not None and func is torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(one is self.tokens for one in places):  # of hidden states, or of weights
                return args[0][:, :1] if any(isinstance(one, int) for one in places) else args[0]
        return func(*args, **(kwargs or {}))
