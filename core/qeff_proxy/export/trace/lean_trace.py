"""Trace without the notes that PyTorch takes and nothing here reads: a fifth of an export's time.

PyTorch keeps the result of each operator for the next call with equal inputs, which hardly comes
where sizes are symbols, and the stack of calls of each node, which no graph on disk holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

from qeff_proxy.common.private_names import TRACING, find
from qeff_proxy.common.shared_change import SharedChanges

_ACTIVE: ContextVar[bool] = ContextVar("without_notes", default=False)
_CHANGES = SharedChanges()


@contextmanager
def without_notes() -> Iterator[None]:
    """Spare traces of this context both."""
    names = find(TRACING)
    if names is None:
        yield
        return
    token = _ACTIVE.set(True)
    try:
        with (
            names.thread_config(fake_tensor_cache_enabled=False),
            _CHANGES.needed("stacks", partial(_replace, names)),
        ):
            yield
    finally:
        _ACTIVE.reset(token)


class _HereOnly:
    """A setting that is true in contexts that trace without notes, and as it was in others."""

    def __init__(self, before: object) -> None:
        self.before = before

    def __bool__(self) -> bool:
        return _ACTIVE.get() or bool(self.before)


def _replace(names: SimpleNamespace) -> Callable[[], object]:
    setting = TRACING["no_stacks"].rpartition(":")[2]
    before = getattr(names.fx_config, setting)
    setattr(names.fx_config, setting, _HereOnly(before))
    return partial(setattr, names.fx_config, setting, before)
