"""How many threads PyTorch uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limit_threads(number: int | None = 1) -> Iterator[None]:
    """Let PyTorch use so many threads; ``None`` sets no limit.

    One is best for small pieces of data: waiting for others takes longer than the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
