"""Draws that follow a seed of their own, whatever else draws numbers at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["draws_seeded"]


class _OwnGenerator(TorchFunctionMode):
    """Gives ``torch.multinomial`` a generator; a mode is in force in its own thread only."""

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
        given = dict(kwargs or {})
        if func is torch.multinomial:
            given["generator"] = self._generator
        return func(*args, **given)


@contextmanager
def draws_seeded(seed: int | None) -> Iterator[None]:
    """Let what is drawn by ``torch.multinomial`` follow ``seed``.

    transformers' generation draws by it from the generator that all threads share. Here it draws
    what it would after ``torch.manual_seed(seed)``, and the shared generator is left alone.

    Args:
        seed: A whole number of 64 bits; ``None``: draw as ever.
    """
    if seed is None:
        yield
        return
    with _OwnGenerator(seed):
        yield
