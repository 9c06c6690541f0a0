"""Keep other libraries quiet in this thread while they load or trace a model.

No level, filter or stream that other threads see is changed: log records and warnings are dropped
by filters that let those of other threads pass.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

from qeff_proxy.common.shared_change import SharedChanges

_TRACERS = ("torch.onnx", "transformers", "onnxscript", "onnx_ir")

#: In this context: loggers, those below them included, whose records below the level are dropped.
_QUIET: ContextVar[tuple[tuple[str, int], ...]] = ContextVar("quiet", default=())
_TRACING: ContextVar[bool] = ContextVar("tracing", default=False)
_LOADING: ContextVar[bool] = ContextVar("loading", default=False)
_WITHOUT_WARNINGS: ContextVar[bool] = ContextVar("without_warnings", default=False)
_CHANGES = SharedChanges()


@contextmanager
def quiet_logs(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Drop this thread's log records below a level.

    Args:
        names: Loggers; those below them are meant, too.
        level: The lowest level that is still logged.
    """
    token = _QUIET.set((*_QUIET.get(), *((name, level) for name in names)))
    try:
        with ExitStack() as stack:
            for handler in _handlers_of(names):
                stack.enter_context(_CHANGES.needed(handler, partial(_filter_handler, handler)))
            yield
    finally:
        _QUIET.reset(token)


@contextmanager
def quiet_tracers() -> Iterator[None]:
    """Keep the tracers' progress lines, version notes and warnings off the terminal."""
    token = _TRACING.set(True)
    try:
        with (
            quiet_logs(*_TRACERS),
            _CHANGES.needed("warnings", _filter_warnings),
            _CHANGES.needed("progress", _silence_export),
        ):
            yield
    finally:
        _TRACING.reset(token)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Drop this thread's warnings."""
    token = _WITHOUT_WARNINGS.set(True)
    try:
        with _CHANGES.needed("warnings", _filter_warnings):
            yield
    finally:
        _WITHOUT_WARNINGS.reset(token)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Leave out transformers' progress bars and load reports; the loader checks what matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger()  # adds the library's handler
    token = _LOADING.set(True)
    try:
        with quiet_logs("transformers"), _CHANGES.needed("bars", _hook_bars):
            yield
    finally:
        _LOADING.reset(token)


class _OtherContexts(logging.Filter):
    """Lets records pass that no open `quiet_logs` of their own context drops."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes."""
        return not any(
            record.levelno < level and f"{record.name}.".startswith(f"{name}.")
            for name, level in _QUIET.get()
        )


_OTHER_CONTEXTS = _OtherContexts()


def _handlers_of(names: Iterable[str]) -> set[logging.Handler]:
    """What handles the records of loggers, and of all loggers below them."""
    handlers = {logging.lastResort} if logging.lastResort is not None else set()
    for name in names:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            handlers.update(logger.handlers)
            logger = logger.parent
    return handlers


def _filter_handler(handler: logging.Handler) -> Callable[[], object]:
    handler.addFilter(_OTHER_CONTEXTS)
    return partial(handler.removeFilter, _OTHER_CONTEXTS)


class _WhileTracing(type):
    def __subclasscheck__(cls, subclass: type) -> bool:
        return _TRACING.get() or _WITHOUT_WARNINGS.get()


class _DroppedWarning(Warning, metaclass=_WhileTracing):
    """A base class of every warning in a context that drops them, and of none elsewhere.

    ``warnings.catch_warnings`` would replace the filters of all threads.
    """


def _filter_warnings() -> Callable[[], object]:
    warnings.simplefilter("ignore", _DroppedWarning)
    entry: Any = warnings.filters[0]

    def undo() -> None:
        with suppress(ValueError):  # others may have replaced the filters meanwhile
            warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return undo


def _silence_export() -> Callable[[], object]:
    """Pass ``verbose=False`` to ``torch.onnx.export``, which transformers does not."""
    import torch

    original = torch.onnx.export

    def export(*args: Any, **kwargs: Any) -> Any:
        if _TRACING.get():
            kwargs = {"verbose": False, **kwargs}
        return original(*args, **kwargs)

    torch.onnx.export = export
    return partial(setattr, torch.onnx, "export", original)


def _hook_bars() -> Callable[[], object]:
    from transformers.utils import logging as transformers_logging

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _LOADING.get():
            kwargs = {**kwargs, "disable": True}
        if previous is not None:
            return previous(factory, args, kwargs)
        return factory(*args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)
    return partial(transformers_logging.set_tqdm_hook, previous)
