"""Copy a module with its first layers only."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qeff_proxy.layers.layer_lists import LayerList, ModuleT, per_layer_settings
from qeff_proxy.layers.replace_modules import replace_modules


def shorten(module: ModuleT, layers: LayerList, count: int) -> ModuleT | None:
    """A copy of ``module`` with its first ``count`` layers only.

    It shares all weights and all other modules with ``module``, which is not changed. The configs
    of the modules around the list are copied and get the new depth.

    Returns:
        The copy, or ``None`` where the configs have no place for the depth.
    """
    short = replace_modules(module, {layers.path: nn.ModuleList(layers.layers[:count])})
    memo: dict[int, Any] = {}
    owner: Any = None
    names = layers.path.split(".")[:-1]
    for end in range(len(names) + 1):
        around = short.get_submodule(".".join(names[:end]))
        config = getattr(around, "config", None)
        if config is not None:
            owner = copy.deepcopy(config, memo)
            around.config = owner
    if owner is None:
        return short
    try:
        _set_depth(owner, layers, count)
    except (ValueError, TypeError, AttributeError):
        return None
    return short


def _set_depth(config: Any, layers: LayerList, count: int) -> None:
    """Set the depth in a config, and cut its lists that have an entry for each layer."""
    for name, value in per_layer_settings(config, len(layers.layers)).items():
        setattr(config, name, value[:count])
    # A config for both an encoder and a decoder has a depth for each.
    depths = [f"{name}_layers" for name in layers.path.split(".")]
    known = [name for name in depths if name in vars(config)]
    setattr(config, known[-1] if known else "num_hidden_layers", count)
