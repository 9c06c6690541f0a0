"""PyTorch's table of ONNX operators, made once in a process instead of once for every graph.

``torch.onnx.export`` reads and parses the source of some 500 operators whenever it is called: about
a CPU second each time. Within `operators_read_once` it gets a copy of a table that is made once and
without parsing: it infers the signature of those operators alone that a graph has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

from qeff_proxy.common.private_names import OPERATOR_TABLE, find
from qeff_proxy.common.shared_change import SharedChanges

_ACTIVE: ContextVar[bool] = ContextVar("operators_read_once", default=False)
_CHANGES = SharedChanges()


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Let exports of this context copy the table; what one adds to its copy, no other sees."""
    names = find(OPERATOR_TABLE)
    if names is None:
        yield
        return
    token = _ACTIVE.set(True)
    try:
        with _CHANGES.needed("from_torchlib", partial(_replace, names)):
            yield
    finally:
        _ACTIVE.reset(token)


def _replace(names: SimpleNamespace) -> Callable[[], object]:
    registry = names.registry
    original = registry.__dict__["from_torchlib"]
    default = inspect.signature(names.from_torchlib).parameters["opset_version"].default

    def from_torchlib(cls: Any, opset_version: int = default) -> Any:
        if not _ACTIVE.get() or cls is not registry:
            return original.__get__(None, cls)(opset_version)
        try:
            table = _table(opset_version)
        except Exception:  # noqa: BLE001 (whatever names that changed their meaning lead to)
            return original.__get__(None, cls)(opset_version)
        copy = cls()
        copy.__dict__.update(table.__dict__)
        copy.functions = {target: list(entries) for target, entries in table.functions.items()}
        return copy

    registry.from_torchlib = classmethod(from_torchlib)
    return partial(setattr, registry, "from_torchlib", original)


@functools.cache
def _table(opset: int) -> Any:
    """What ``ONNXRegistry.from_torchlib`` makes, but for the signatures that it parses."""
    names = find(OPERATOR_TABLE)
    assert names is not None  # noqa: S101 (`operators_read_once` found them)
    table = names.registry()
    table._opset_version = opset  # noqa: SLF001 (as from_torchlib does)
    for entry in names.of_pytorch():
        names.register(table, entry.fx_target, entry)
    for name, kinds in names.of_onnxscript.items():
        target = None if name.startswith("internal::") else names.overload_named(name)
        if target is None:
            continue
        for functions, is_complex in ((kinds.overloads, False), (kinds.complex, True)):
            for function in functions:
                entry = names.entry(
                    function, target, None, is_complex=is_complex, skip_signature_inference=True
                )
                names.register(table, target, entry)
    names.clean(table)
    return table
