"""The layers of a model, and which of them are alike.

Two layers are of one kind where they run the same code, with the same settings, on weights of the
same shapes: alike in every module, shape, buffer and setting except their index. Nothing here knows
an architecture.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from qeff_proxy.arrays import to_array
from qeff_proxy.surgery import replace_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "INDEX",
    "LayerList",
    "describe_kinds",
    "find_layer_list",
    "layer_lists",
    "prefix_with_every_kind",
    "shorten",
    "uses_index",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: The attribute in which modules keep the index of their layer.
INDEX = "layer_idx"
#: What may be looked up by that index: it holds something for each layer, weights or not.
_CACHE = re.compile(r"past_key_value|cache|is_updated", re.IGNORECASE)


#: Fewer layers than these are not worth telling apart.
_FEWEST = 3


@dataclass(frozen=True)
class LayerList:
    """The list of a model's layers.

    Attributes:
        path: Dotted path of the list in the module it was looked for in.
        layers: Its members.
        kinds: The kind of each, numbered in the order in which the kinds first occur.
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[int, ...]


def find_layer_list(module: nn.Module, depth: int | None = None) -> LayerList | None:
    """The list of layers in ``module``: of all lists the one with the most parameters.

    Args:
        module: What holds them, at any depth.
        depth: How long the list must be, where that is known.
    """
    lists = [
        (path, tuple(one))
        for path, one in module.named_modules()
        if isinstance(one, nn.ModuleList) and len(one) and (depth is None or len(one) == depth)
    ]
    if not lists:
        return None
    path, layers = max(lists, key=lambda item: _size(item[1]))
    return LayerList(path, layers, _kinds(layers, _config_around(module, path)))


def layer_lists(module: nn.Module) -> Iterator[LayerList]:
    """The lists in ``module`` of which some members are alike; none of them within another.

    Lists whose members calculate with their index are left out.
    """
    taken: list[str] = []
    for path, one in module.named_modules():
        if not isinstance(one, nn.ModuleList | nn.Sequential) or len(one) < _FEWEST:
            continue
        if any(path.startswith(f"{outer}.") for outer in taken):
            continue
        layers = tuple(one)
        kinds = _kinds(layers, _config_around(module, path))
        if len(set(kinds)) < len(kinds) and not uses_index(layers):
            taken.append(path)
            yield LayerList(path, layers, kinds)


def _kinds(layers: Sequence[nn.Module], config: Any) -> tuple[int, ...]:
    """The kind of each layer, numbered in the order in which the kinds first occur."""
    said = [value for _, value in sorted(_per_layer(config, len(layers)).items())]
    marks = [
        f"{_fingerprint(layer)}|{[values[index] for values in said]}"
        for index, layer in enumerate(layers)
    ]
    first = list(dict.fromkeys(marks))
    return tuple(first.index(mark) for mark in marks)


def _config_around(module: nn.Module, path: str) -> Any:
    """The config of the innermost module around ``path`` that has one, or ``None``."""
    names = path.split(".")[:-1]
    for end in range(len(names), -1, -1):
        config = getattr(module.get_submodule(".".join(names[:end])), "config", None)
        if config is not None:
            return config
    return None


def _per_layer(config: Any, depth: int) -> dict[str, Any]:
    """The lists of a config that have an entry for each layer, such as ``layer_types``."""
    if config is None:
        return {}
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == depth
    }


def prefix_with_every_kind(kinds: Sequence[int], times: int = 1) -> int:
    """Length of the shortest prefix that holds every kind ``times`` times, or as often as it is."""
    wanted = {kind: min(times, list(kinds).count(kind)) for kind in set(kinds)}
    for length in range(len(kinds) + 1):
        if all(list(kinds[:length]).count(kind) >= count for kind, count in wanted.items()):
            return length
    return len(kinds)


def describe_kinds(found: LayerList) -> list[dict[str, Any]]:
    """One JSON object per kind: the layers' class, which they are, and what sets them apart."""
    described = []
    for kind in dict.fromkeys(found.kinds):
        members = [index for index, one in enumerate(found.kinds) if one == kind]
        layer = found.layers[members[0]]
        words = [
            str(value)
            for module in layer.modules()
            for name in ("attention_type", "layer_type")
            if isinstance(value := vars(module).get(name), str)
        ]
        own = {id(p): p.numel() for p in layer.parameters()}
        described.append(
            {
                "class": type(layer).__name__,
                "layers": members,
                "says": list(dict.fromkeys(words)),
                "parameters": sum(own.values()),
            }
        )
    return described


def uses_index(layers: Iterable[nn.Module]) -> bool:
    """Whether code of the layers calculates with their index, so that like layers may differ.

    Handing the index on to a call, as to the cache, is no calculation.
    """
    classes = {
        type(module) for layer in layers for module in layer.modules() if INDEX in vars(module)
    }
    return any(_class_uses_index(one) for one in classes)


def _class_uses_index(kind: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return True  # what cannot be read is not trusted
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp | ast.Compare | ast.Subscript | ast.IfExp) and any(
                isinstance(inner, ast.Attribute) and inner.attr == INDEX
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


def shorten(module: ModuleT, found: LayerList, chosen: Sequence[int]) -> ModuleT | None:
    """A copy of ``module`` that has only the chosen layers, each as if it stood where it now does.

    Weights and all other modules are the very objects of ``module``, which stays as it was. The
    configs of the modules around the list are copied and say the new depth.

    Returns:
        The copy, or ``None`` where the configs cannot say it.
    """
    layers = [_with_index(found.layers[index], at) for at, index in enumerate(chosen)]
    short = replace_modules(module, {found.path: nn.ModuleList(layers)})
    memo: dict[int, Any] = {}
    owner: Any = None
    names = found.path.split(".")[:-1]
    for end in range(len(names) + 1):
        around = short.get_submodule(".".join(names[:end]))
        config = getattr(around, "config", None)
        if config is not None:
            owner = copy.deepcopy(config, memo)
            around.config = owner
    if owner is None:
        return short
    try:
        _set_depth(owner, found, chosen)
    except (ValueError, TypeError, AttributeError):
        return None
    return short


def _set_depth(config: Any, found: LayerList, chosen: Sequence[int]) -> None:
    """Let a config say the chosen layers, in every list that has an entry for each."""
    for name, value in _per_layer(config, len(found.layers)).items():
        setattr(config, name, type(value)(value[index] for index in chosen))
    # An encoder and a decoder in one config each have a depth of their own.
    own = [f"{one}_layers" for one in found.path.split(".") if f"{one}_layers" in vars(config)]
    setattr(config, own[-1] if own else "num_hidden_layers", len(chosen))


def _size(layers: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _fingerprint(layer: nn.Module) -> str:
    """Equal for two layers that run the same code on weights of the same shapes."""
    digest = hashlib.sha256()
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if name != INDEX and isinstance(value, bool | int | float | str | tuple | type(None))
        }
        digest.update(f"{path}|{type(module).__qualname__}|{sorted(settings.items())}".encode())
        for name, parameter in module.named_parameters(recurse=False):
            digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        for name, buffer in module.named_buffers(recurse=False):
            digest.update(f"{name}|{tuple(buffer.shape)}|{buffer.dtype}".encode())
            if not buffer.is_meta:
                digest.update(to_array(buffer).tobytes())
    return digest.hexdigest()


def _with_index(layer: nn.Module, position: int) -> nn.Module:
    """The layer as if it stood at ``position``."""
    changes: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        if path and isinstance(vars(module).get(INDEX), int):
            clone = replace_modules(module, {})
            setattr(clone, INDEX, position)
            changes[path] = clone
    result = replace_modules(layer, changes)
    if isinstance(vars(result).get(INDEX), int):
        setattr(result, INDEX, position)
    return result
