"""PyTorch's table of ONNX operators, made once in a process instead of once in every trace.

``torch.onnx.export`` reads and parses the source of some 500 operators whenever it is called, about
a CPU second that says the same each time. Within `operators_read_once` it is given a copy of the
table that the first call made, and sources are read of those operators alone that a graph has: what
writes an operator does so by itself where the table has not.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

from onnxscript.function_libs.torch_lib import registration
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry

__all__ = ["operators_read_once"]

_ORIGINAL = ONNXRegistry.__dict__["from_torchlib"]
_NONE: Mapping[Any, Callable[..., Any]] = MappingProxyType({})
_make_table = _ORIGINAL.__func__


@functools.cache
def _table(opset: int) -> ONNXRegistry:
    with _no_sources():
        table: ONNXRegistry = _make_table(ONNXRegistry, opset)
    return table


@contextmanager
def _no_sources() -> Iterator[None]:
    """Let this thread make a table without reading what operators are written with."""
    thread = threading.get_ident()
    infer, apis = OnnxDecompMeta.__post_init__, _registration.onnxscript_apis

    def leave(self: OnnxDecompMeta) -> None:
        if threading.get_ident() != thread:
            infer(self)

    OnnxDecompMeta.__post_init__ = leave
    _registration.onnxscript_apis = SimpleNamespace(get_torchlib_ops=lambda: list(_operators()))
    try:
        yield
    finally:
        OnnxDecompMeta.__post_init__ = infer
        _registration.onnxscript_apis = apis


def _operators() -> Iterator[Any]:
    """As ``get_torchlib_ops`` of onnxscript, but for what only the source says."""
    importlib.import_module("onnxscript.function_libs.torch_lib.ops")  # which registers them
    for name, found in registration.default_registry.items():
        if name.startswith("internal::"):
            continue
        for functions, is_complex in ((found.overloads, False), (found.complex, True)):
            for one in functions:
                yield SimpleNamespace(qualified_name=name, function=one, is_complex=is_complex)


@contextmanager
def operators_read_once(more: Mapping[Any, Callable[..., Any]] = _NONE) -> Iterator[None]:
    """Let traces of this thread share the table; what one adds to its copy, no other sees.

    Args:
        more: Operators of one's own → how each is written.
    """
    thread = threading.get_ident()

    def from_torchlib(cls: type[ONNXRegistry], opset_version: int | None = None) -> Any:
        given = () if opset_version is None else (opset_version,)
        if threading.get_ident() != thread or cls is not ONNXRegistry:
            return _ORIGINAL.__get__(None, cls)(*given)
        made = _table(*(given or _make_table.__defaults__))
        copy = cls()
        copy.__dict__.update(made.__dict__)
        copy.functions = {target: list(found) for target, found in made.functions.items()}
        for target, function in more.items():
            copy.register_op(target, function)
        return copy

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = _ORIGINAL
