"""The tensors that a layer reads and writes in a cache.

A cache of transformers holds an object for each layer, with tensors as attributes. `LayerCache`
gives those of one layer, so that they can be handled as its inputs and outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache


class LayerCache:
    """The tensors that a cache holds for one layer.

    Args:
        cache: The cache, or one of several caches.
        index: The layer's index; ``None`` where it has none.
    """

    def __init__(self, cache: Cache, index: int | None) -> None:
        self.cache = cache
        self.index = index

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of this layer, by place."""
        return {
            place: value
            for place, holder, name in self._own()
            if isinstance(value := holder[name], torch.Tensor)
        }

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set tensors of this layer."""
        for place, holder, name in list(self._own()):
            if place in tensors:
                holder[name] = tensors[place]

    def fill_as(self, like: int | None) -> None:
        """Give a cache that layer ``like`` has written the same entry for this layer."""
        if self.index is None or like is None:
            return
        for _, one in _caches(self.cache, ""):
            layers = vars(one).get("layers") or []
            while like < len(layers) <= self.index:
                layers.append(_copied(layers[like]))
            if self.index < len(layers) and not _is_used(layers[self.index]):
                layers[self.index] = _copied(layers[like])

    def plain(self) -> str:
        """All other values that the cache has for this layer."""
        said = [
            (place, repr(holder[name]))
            for place, holder, name in self._own()
            if not isinstance(holder[name], torch.Tensor)
        ]
        for path, one in _caches(self.cache, ""):
            for name, value in sorted(vars(one).items()):
                if isinstance(value, dict):
                    said.append((f"{path}{name}", repr(value.get(self.index))))
                elif isinstance(value, bool | int | float | str | type(None)):
                    said.append((f"{path}{name}", repr(value)))
        return repr(said)

    def others(self) -> list[tuple[str, int]]:
        """The tensors of other layers, to see whether any was exchanged."""
        return [
            (f"{path}{index}.{place}", id(values[name]))
            for path, one in _caches(self.cache, "")
            for index, holder in enumerate(_layers(one))
            if index != self.index
            for place, values, name in _values(holder)
            if isinstance(values[name], torch.Tensor)
        ]

    def _own(self) -> Iterator[tuple[str, dict[Any, Any], Any]]:
        for path, one in _caches(self.cache, ""):
            layers = _layers(one)
            if self.index is not None and self.index < len(layers):
                for place, values, name in _values(layers[self.index]):
                    yield f"{path}{place}", values, name


def _values(layer: Any) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """The place of each value that an entry of a cache has, and the dictionary that holds it."""
    for name, value in sorted(vars(layer).items()):
        if isinstance(value, dict):  # several states, by number
            for number in value:
                yield f"{name}.{number}", value, number
        else:
            yield name, vars(layer), name


def _is_used(layer: Any) -> bool:
    return any(isinstance(values[name], torch.Tensor) for _, values, name in _values(layer))


def _copied(layer: Any) -> Any:
    """A copy of an entry that shares the tensors, and nothing that holds them."""
    twin = copy.copy(layer)
    vars(twin).update({n: dict(v) for n, v in vars(layer).items() if isinstance(v, dict)})
    return twin


def _layers(cache: Cache) -> Sequence[Any]:
    return vars(cache).get("layers") or ()


def _caches(cache: Cache, path: str) -> Iterator[tuple[str, Cache]]:
    """A cache and the caches in it, such as an encoder's and a decoder's."""
    yield path, cache
    for name, value in sorted(vars(cache).items()):
        if isinstance(value, Cache):
            yield from _caches(value, f"{path}{name}.")
