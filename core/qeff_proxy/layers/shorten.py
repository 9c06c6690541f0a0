"""Copy a module with only some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from qeff_proxy.layers.index_use import INDEX
from qeff_proxy.layers.layer_lists import LayerList, ModuleT, per_layer_settings
from qeff_proxy.layers.replace_modules import replace_modules

__all__ = ["shorten"]


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
    for name, value in per_layer_settings(config, len(found.layers)).items():
        setattr(config, name, type(value)(value[index] for index in chosen))
    # An encoder and a decoder in one config each have a depth of their own.
    own = [f"{one}_layers" for one in found.path.split(".") if f"{one}_layers" in vars(config)]
    setattr(config, own[-1] if own else "num_hidden_layers", len(chosen))


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
