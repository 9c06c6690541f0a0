"""Changes of process-wide state that several threads may need at once.

A change is made when the first thread needs it and undone when the last no longer does, so that
threads may start and finish in any order. What is changed must ask `threading.get_ident` or a
`contextvars.ContextVar` whom it serves: to all other threads it must look unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MODEL_LOCK = threading.RLock()


def one_model_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let one thread at a time load, cut or trace a model, or open a PyTorch session.

    Meanwhile transformers and ``torch.export`` change process-wide state of their own (the default
    dtype, weight initialization, operators of ``torch``), and restore it in the order of one
    thread.
    """

    @wraps(function)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _MODEL_LOCK:
            return function(*args, **kwargs)

    return locked


class SharedChanges:
    """Changes by key, each with the number of contexts that need it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: dict[Hashable, tuple[int, Callable[[], object]]] = {}

    @contextmanager
    def needed(self, key: Hashable, make: Callable[[], Callable[[], object]]) -> Iterator[None]:
        """Keep a change while the context is open.

        Args:
            key: Names the change.
            make: Makes it, and returns what undoes it.
        """
        with self._lock:
            users, undo = self._changes.get(key) or (0, make())
            self._changes[key] = users + 1, undo
        try:
            yield
        finally:
            with self._lock:
                users, undo = self._changes.pop(key)
                if users > 1:
                    self._changes[key] = users - 1, undo
                else:
                    undo()
