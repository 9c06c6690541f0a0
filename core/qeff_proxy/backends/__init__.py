"""Backends compile and run parts.

A backend is one class in a module of its own, imported on first use. A package registers its
own as an entry point of the group ``qeff_proxy.backends``: the name users type → the class.
"""

from __future__ import annotations

from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.backends.registry import list_backends, load_backend

__all__ = ["Backend", "Compiled", "compile_export", "list_backends", "load_backend"]
