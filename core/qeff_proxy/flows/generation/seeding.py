"""Sample from a seed of one's own, undisturbed by other threads that draw random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _OwnGenerator(TorchFunctionMode):
    """Passes a generator to ``torch.multinomial``; a mode acts in its own thread only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        arguments = dict(kwargs or {})
        if func is torch.multinomial:
            arguments["generator"] = self._generator
        return func(*args, **arguments)


@contextmanager
def draws_seeded(seed: int | None) -> Iterator[None]:
    """Seed the draws of ``torch.multinomial``.

    transformers samples with it, from the generator that all threads share. Inside this context it
    draws the same as after ``torch.manual_seed(seed)``, and the shared generator stays unchanged.

    Args:
        seed: A whole number of 64 bits; ``None`` changes nothing.
    """
    if seed is None:
        yield
        return
    with _OwnGenerator(seed):
        yield
