"""From a part with a model's first layers to the part with all of them: to be traced, not run.

A checkpoint is cut with only its first layers there (`qeff_proxy.load.first_layers`), so that its
parts hold a list of these. Here the list in a part is exchanged for that of all layers, whose other
weights are on the meta device, and the configs around it for those that say all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.layers.taps import TappedPart
from qeff_proxy.tensor_names import LAYER_NAME

if TYPE_CHECKING:
    from qeff_proxy.layers.layer_lists import LayerList
    from qeff_proxy.parts import Part, TensorSpec

__all__ = ["Lengthens", "lengthen"]


@runtime_checkable
class Lengthens(Protocol):
    """A part's module that holds what belongs to layers, and not the list of them."""

    def lengthened(self, layers: nn.ModuleList) -> nn.Module:
        """The module for these layers."""


def lengthen(part: Part, short: nn.Module, whole: nn.Module, found: LayerList) -> Part | None:
    """The part with all layers; ``None`` where it holds no list of the first ones.

    Args:
        part: A part of ``short``. It is not changed.
        short: The model with its first layers.
        whole: The model with all layers.
        found: Those, by their path in both.
    """
    tapped = part.module if isinstance(part.module, TappedPart) else None
    inner = part.module if tapped is None else tapped.module
    layers = nn.ModuleList(found.layers)
    module = _lengthened(inner, short, whole, found.path, layers)
    if module is None:
        return None
    if tapped is not None:
        module = TappedPart(module, found.layers, tapped.taps).eval()
    chosen = [found.kinds.index(kind) for kind in found.kinds]
    return replace(
        part,
        module=module,
        inputs=_specs_of(part.inputs, chosen),
        outputs=_specs_of(part.outputs, chosen),
    )


def _lengthened(
    inner: nn.Module, short: nn.Module, whole: nn.Module, path: str, layers: nn.ModuleList
) -> nn.Module | None:
    first = short.get_submodule(path)
    places = [name for name, one in inner.named_modules(remove_duplicate=False) if one is first]
    if not places:
        return inner.lengthened(layers).eval() if isinstance(inner, Lengthens) else None
    module = replace_modules(inner, dict.fromkeys(places, layers))
    configs = dict(_configs(short, whole, path))
    for place in places:
        names = place.split(".")[:-1]
        for end in range(len(names) + 1):
            around: Any = module.get_submodule(".".join(names[:end]))
            config = configs.get(id(vars(around).get("config")))
            if config is not None:
                around.config = config
    return module


def _configs(short: nn.Module, whole: nn.Module, path: str) -> list[tuple[int, Any]]:
    """``id`` of each config that says the first layers → the one that says all."""
    names = path.split(".")[:-1]
    found = []
    for end in range(len(names) + 1):
        around = ".".join(names[:end])
        config = vars(short.get_submodule(around)).get("config")
        if config is not None:
            found.append((id(config), vars(whole.get_submodule(around))["config"]))
    return found


def _specs_of(specs: Sequence[TensorSpec], chosen: Sequence[int]) -> tuple[TensorSpec, ...]:
    """The specs, with those of the chosen layers, renumbered, where those of all layers were."""
    result: list[TensorSpec] = []
    done: set[str] = set()
    matches = [(one, LAYER_NAME.fullmatch(one.name)) for one in specs]
    for spec, match in matches:
        if match is None:
            result.append(spec)
            continue
        if match[1] in done:
            continue
        done.add(match[1])
        for position, index in enumerate(chosen):
            result += [
                replace(one, name=f"{match[1]}.{position}{other[3]}")
                for one, other in matches
                if other is not None and other[1] == match[1] and int(other[2]) == index
            ]
    return tuple(result)
