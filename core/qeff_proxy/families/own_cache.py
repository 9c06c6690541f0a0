"""Caches of a class that a model's own code defines, learnt from what runs of the model leave.

The tensors in such a cache are found wherever it holds them: those with a row for each of the batch
are its keys, values and states. A run of the part gets a copy of it with other tensors in their
places. Some models keep states in attributes of their modules, beside the cache; then these are
part of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from qeff_proxy.arrays import dtype_name
from qeff_proxy.families.decoder_cache import CacheLayer
from qeff_proxy.parts import TensorSpec

_Path = tuple[Any, ...]
_States = Mapping[int, Mapping[str, torch.Tensor]]
_GROWING = {"keys": "key", "values": "value"}
_LENGTH = 2  # the axis of positions in keys and values


@dataclass(frozen=True)
class OwnCache:
    """A model's own cache.

    Attributes:
        template: What a run left.
        places: Where the tensors of each layer are in it: the layer's number and the tensor's name.
        layers: What each layer keeps.
        in_modules: Whether it is a mapping of a ``cache`` and of the ``held`` states of modules.
    """

    template: Any
    places: Mapping[_Path, tuple[int, str]]
    layers: tuple[CacheLayer, ...]
    in_modules: bool = False

    def filled(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> Any:
        """A cache of ``<prefix>__<layer>__<name>``; they are not changed."""

        def put(value: Any, path: _Path = ()) -> Any:
            if path in self.places:
                layer, name = self.places[path]
                return tensors[f"{prefix}__{layer}__{name}"].clone()
            if isinstance(value, torch.Tensor):
                return value.clone()
            inner = {key: put(one, (*path, key)) for key, one in _inside(value)}
            if isinstance(value, list | tuple):
                return type(value)(inner.values())
            if isinstance(value, dict):
                return inner
            if not inner:
                return value
            result = copy.copy(value)
            vars(result).update(inner)
            return result

        return put(self.template)

    def tensors(self, cache: Any) -> dict[str, torch.Tensor]:
        """``<layer>.<name>`` of a cache after a run, in the order of the layers."""
        found = dict(_tensors_in(cache))
        paths = sorted(self.places, key=lambda path: self.places[path][0])
        return {"{}.{}".format(*self.places[path]): found[path] for path in paths}


def find_own_cache(run: Callable[[int, int], Any]) -> OwnCache | None:
    """Learn a model's own cache.

    Args:
        run: Runs the model without a cache on so many rows of so many embeddings, and returns what
            it cached.

    Returns:
        ``None`` where something in it is neither keys, values nor a state of a layer.
    """
    template = run(1, 1)
    one, rows, positions = (dict(_tensors_in(c)) for c in (template, run(2, 1), run(1, 2)))
    if not one.keys() == rows.keys() == positions.keys():
        return None
    places: dict[_Path, tuple[int, str]] = {}
    layers: dict[int, CacheLayer] = {}
    states: Counter[tuple[int, str]] = Counter()
    for path, tensor in one.items():
        if rows[path].shape == tensor.shape:  # no part of a row's past
            continue
        layer = next((step for step in path if isinstance(step, int)), None)
        axes: list[int | str] = ["batch", *tensor.shape[1:]]
        longer = [i for i, n in enumerate(positions[path].shape) if n != tensor.shape[i]]
        if layer is None or rows[path].shape != (2, *tensor.shape[1:]):
            return None
        if longer:
            if longer != [_LENGTH] or len(axes) != _LENGTH + 2 or path[-1] not in _GROWING:
                return None
            name, axes[_LENGTH] = _GROWING[path[-1]], "past"
        else:
            kind = "conv" if "conv" in str(path[-1]) else "recurrent"
            number = states[layer, kind]
            name = f"{kind}_state_{number}" if number else f"{kind}_state"
            states[layer, kind] += 1
        places[path] = layer, name
        spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(axes))
        layers[layer] = (*layers.get(layer, ()), spec)
    if not layers:
        return None
    every = tuple(layers.get(index, ()) for index in range(max(layers) + 1))
    return OwnCache(template, places, every)


def find_held_states(decoder: nn.Module, run: Callable[[int, int, Any], Any]) -> OwnCache | None:
    """Learn the states that the modules of a decoder keep, beside a cache that it is given.

    Args:
        decoder: The model.
        run: Runs it as for `find_own_cache`, with this cache.

    Returns:
        ``None`` where they keep none, or as for `find_own_cache`.
    """

    def cached(rows: int, positions: int) -> Any:
        cache = DynamicCache()
        with held_states(decoder, {}) as read:
            run(rows, positions, cache)
            return {"cache": cache, "held": read()}

    if not cached(1, 1)["held"]:
        return None
    found = find_own_cache(cached)
    return None if found is None else replace(found, in_modules=True)


@contextmanager
def held_states(
    decoder: nn.Module, states: _States
) -> Iterator[Callable[[], dict[int, dict[str, torch.Tensor]]]]:
    """Let the modules of a decoder hold these states while the context is open.

    Args:
        decoder: The model; its modules hold afterwards what they did before.
        states: Layer → path of the attribute → tensor.

    Yields:
        What gives the states that the modules hold after a run.
    """
    modules = dict(decoder.named_modules())
    before = {path: dict(vars(module)) for path, module in modules.items()}

    def read() -> dict[int, dict[str, torch.Tensor]]:
        held: dict[int, dict[str, torch.Tensor]] = {}
        for path, module in modules.items():
            layer = next((int(step) for step in path.split(".") if step.isdigit()), 0)
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and before[path].get(name) is not value:
                    held.setdefault(layer, {})[f"{path}.{name}"] = value
        return held

    for attributes in states.values():
        for place, state in attributes.items():
            path, _, name = place.rpartition(".")
            setattr(modules[path], name, state)
    try:
        yield read
    finally:
        for path, module in modules.items():
            attributes = module.__dict__  # all of them: a count may go with a tensor
            for name in set(attributes) - set(before[path]):
                del attributes[name]
            attributes.update(before[path])


def without_padding(states: _States, is_token: torch.Tensor) -> _States:
    """The states after one position, as before the first where ``is_token [batch]`` is false."""
    return {
        layer: {
            place: torch.where(is_token.reshape(-1, *[1] * (state.dim() - 1)), state, 0)
            for place, state in attributes.items()
        }
        for layer, attributes in states.items()
    }


def _tensors_in(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    for key, inner in _inside(value):
        yield from _tensors_in(inner, (*path, key))


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a list, a mapping or a plain object holds, by index, key or attribute."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif not isinstance(value, torch.Tensor | nn.Module | PreTrainedConfig | type):
        yield from getattr(value, "__dict__", {}).items()
