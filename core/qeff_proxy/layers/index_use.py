"""Find layers whose code calculates with their index."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable

from torch import nn

#: The attributes in which modules keep the index of their layer, from 0.
INDEX_NAMES = frozenset({"layer_idx", "layer_id", "layer_index"})


#: Names of caches, which may be indexed by it: they have an entry for each layer.
_CACHE = re.compile(r"past_key_value|cache|is_updated", re.IGNORECASE)


def keeps_index(module: nn.Module) -> bool:
    """Whether a module has the index of its layer."""
    return not INDEX_NAMES.isdisjoint(vars(module))


def uses_index(layers: Iterable[nn.Module]) -> bool:
    """Whether code of the layers calculates with their index, so that like layers may differ.

    Handing the index on to a call, as to the cache, is no calculation.
    """
    classes = {
        type(module) for layer in layers for module in layer.modules() if keeps_index(module)
    }
    return any(_class_uses_index(one) for one in classes)


def _class_uses_index(kind: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return True  # without its source it may do anything
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp | ast.Compare | ast.Subscript | ast.IfExp) and any(
                isinstance(inner, ast.Attribute) and inner.attr in INDEX_NAMES
                for child in _operands(node)
                for inner in _without_calls(child)
            ):
                return True
    return False


def _operands(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Subscript):
        return [] if _CACHE.search(ast.unparse(node.value)) else [node.slice]
    if isinstance(node, ast.IfExp):
        return [node.test]
    if isinstance(node, ast.Compare) and all(
        isinstance(one, ast.Constant) and one.value is None for one in node.comparators
    ):
        return []  # whether there is an index at all
    return list(ast.iter_child_nodes(node))


def _without_calls(node: ast.AST) -> Iterable[ast.AST]:
    """The nodes below ``node``, but not the arguments of calls other than of conversions."""
    yield node
    if isinstance(node, ast.Call) and not (
        isinstance(node.func, ast.Name) and node.func.id in {"float", "int"}
    ):
        return
    for child in ast.iter_child_nodes(node):
        yield from _without_calls(child)
