"""The cache of a decoder: the tensors that it keeps for each layer, and how the model gets them.

Keys and values grow with each step, along the axis ``past``; so do the keys of an indexer, by which
a layer chooses the positions that it attends to. The states of convolutions and of recurrent layers
(linear attention, Mamba) keep their size: each step replaces them. A layer may have both, or
neither. What a layer keeps is read from the cache after a run of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from qeff_proxy.arrays import dtype_name
from qeff_proxy.parts import TensorSpec

#: The tensors that a decoder keeps for one layer: ``key`` and ``value`` ``[batch, heads, past,
#: width]``, ``indexer_key [batch, 1, past, width]``, ``conv_state`` and ``recurrent_state``
#: ``[batch, …]``, a second state ``conv_state_1``.
CacheLayer = tuple[TensorSpec, ...]

_KINDS = ("conv", "recurrent")
#: The layer that keeps nothing; before transformers 5.23 one that never gets keys.
_NoCache: type[Any] = getattr(cache_utils, "DummyLayer", DynamicLayer)
_OF_CONFIG = tuple({LinearAttentionLayer, DynamicIndexedLayer, _NoCache} - {DynamicLayer})
_GROWING = ("key", "value", "indexer_key")
_KNOWN = (
    *(DynamicLayer, DynamicIndexedLayer, _NoCache),
    *(LinearAttentionLayer, LinearAttentionAndFullAttentionLayer),
)


def attention_cache(heads: int, width: int, dtype: str) -> CacheLayer:
    """The cache of a layer that keeps keys and values of one shape."""
    shape = ("batch", heads, "past", width)
    return TensorSpec("key", dtype, shape), TensorSpec("value", dtype, shape)


def layers_of(config: Any) -> list[Any]:
    """The layers of a cache that is made for a config; none where that knows no such cache."""
    try:
        return list(DynamicCache(config=config).layers)
    except (LookupError, AttributeError):  # kinds of layers that transformers does not know
        return []


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a model; its layers keep all positions, whatever the model's window.

    The masks hide what is outside of a window. Only a cache with layers that keep something else
    than keys and values has its layers from the config; any other one adds them as the model runs.
    """
    layers = layers_of(config)
    cache = DynamicCache()
    if any(isinstance(layer, _OF_CONFIG) for layer in layers):
        cache.layers = [without_window(layer) for layer in layers]
    return cache


def without_window(layer: Any) -> Any:
    """The layer of a cache, or one that keeps all positions in place of those of a window."""
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        return LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    return layer


def is_known(layer: Any) -> bool:
    """Whether a layer of a cache keeps nothing but keys, values and states, keys of four axes."""
    return type(layer) in _KNOWN and all(
        tensor.dim() == 4 for name, tensor in cached_tensors(layer).items() if name == "key"
    )


def own_states(layer: Any) -> list[str]:
    """What a layer of a model's own class keeps beside the keys and values of a window."""
    if (
        not isinstance(layer, DynamicSlidingWindowLayer)
        or type(layer) in vars(cache_utils).values()
    ):
        return []
    plain = vars(DynamicSlidingWindowLayer(sliding_window=1))
    return sorted(n for n, v in vars(layer).items() if n not in plain and not callable(v))


def cached_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors that a layer of a cache keeps, by name; see `CacheLayer`."""
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        tensors.update(key=layer.keys, value=layer.values)
    if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
        tensors["indexer_key"] = layer.indexer_keys[:, None]
    if isinstance(layer, LinearAttentionLayer):
        for kind in _KINDS:
            for number, state in getattr(layer, f"{kind}_states").items():
                if state is not None:
                    tensors[f"{kind}_state_{number}" if number else f"{kind}_state"] = state
    return tensors


def describe_cache(layer: Any) -> CacheLayer:
    """The tensors of a layer of a cache after a run, with their axes."""
    specs = []
    for name, tensor in cached_tensors(layer).items():
        axes: list[int | str] = ["batch", *tensor.shape[1:]]
        if name in _GROWING:
            axes[2] = "past"
        specs.append(TensorSpec(name, dtype_name(tensor.dtype), tuple(axes)))
    return tuple(specs)


def filled_cache(
    layers: Sequence[CacheLayer], tensors: Mapping[str, torch.Tensor], prefix: str
) -> DynamicCache:
    """A cache for a run of the model.

    Args:
        layers: What each layer keeps.
        tensors: The tensors of all layers: ``<prefix>__<layer>__<name>``. They are not changed.
        prefix: Of their names.
    """
    cache = DynamicCache()
    for index, specs in enumerate(layers):
        own = {spec.name: tensors[f"{prefix}__{index}__{spec.name}"] for spec in specs}
        cache.layers.append(_filled_layer(own))
    return cache


def _filled_layer(tensors: Mapping[str, torch.Tensor]) -> Any:
    if not tensors:
        empty = _NoCache()
        empty.is_initialized = False  # else some take keys from it
        return empty
    grows = "key" in tensors
    states = {name: tensor for name, tensor in tensors.items() if name not in _GROWING}
    layer: Any = DynamicIndexedLayer() if "indexer_key" in tensors else DynamicLayer()
    if states:
        kind = LinearAttentionAndFullAttentionLayer if grows else LinearAttentionLayer
        layer = kind(number_of_states=1 + max(map(_number_of, states)))
    if grows:
        layer.lazy_initialization(tensors["key"], tensors["value"])
        layer.keys, layer.values = tensors["key"], tensors["value"]
    if "indexer_key" in tensors:
        layer.lazy_initialization_indexer(tensors["indexer_key"])
        layer.indexer_keys = tensors["indexer_key"][:, 0]
    for name, state in states.items():
        kind, number = name.partition("_")[0], _number_of(name)
        layer.dtype, layer.device = state.dtype, state.device
        getattr(layer, f"{kind}_states")[number] = state.clone()  # models write into states
        getattr(layer, f"is_{kind}_states_initialized")[number] = True
        layer.has_previous_state[number] = True
        if kind == "conv":
            layer.conv_kernel_size[number] = state.shape[-1]
    return layer


def _number_of(name: str) -> int:
    """The number of a state in its layer: 0 for ``conv_state``, 1 for ``conv_state_1``."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else 0
