"""Load a checkpoint with weights for its first layers only.

transformers loads it by its public ``from_pretrained``, from tensors of which nearly all are on the
meta device: it renames, converts and checks as ever, and reads next to nothing. Then the weights of
the first layers, and all outside of the layers, are mapped from the checkpoint's files. So shapes,
names, ties and missing weights are known of the whole model, at the price of a few layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qeff_proxy.arrays import dtype_name
from qeff_proxy.layers.index_use import uses_index
from qeff_proxy.layers.layer_lists import LayerList, find_layer_list, prefix_with_every_kind
from qeff_proxy.layers.shorten import shorten
from qeff_proxy.load.checkpoint_files import read_config_file
from qeff_proxy.load.mapped_memory import LARGE, Scratch
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.transformers_model import NotSampled
from qeff_proxy.load.weight_sources import (
    StoredWeight,
    Weight,
    WeightSources,
    aliases_of,
    converter_of,
    model_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SampledModel:
    """A model with weights for its first layers only.

    Attributes:
        model: All of it; the other layers' weights are on the meta device.
        layers: Its layers.
        count: How many of them have weights.
        sources: Where each weight comes from.
    """

    model: PreTrainedModel
    layers: LayerList
    count: int
    sources: WeightSources

    @property
    def is_whole(self) -> bool:
        """Whether all layers have weights."""
        return self.count == len(self.layers.layers)

    def check_alike(self) -> None:
        """Make sure that the other layers are like those that have weights.

        Raises:
            NotSampled: They may not be.
        """
        if self.is_whole:
            return
        if prefix_with_every_kind(self.layers.kinds) > self.count:
            raise NotSampled("its layers hold different constants")
        if uses_index(self.layers.layers):
            raise NotSampled("its layers calculate with their index")

    def first(self, count: int) -> SampledModel:
        """The model with its first ``count`` layers only.

        Raises:
            NotSampled: Its config has no place for their number.
        """
        if count == len(self.layers.layers):
            return self
        model = shorten(self.model, self.layers, count)
        if model is None:
            raise NotSampled("its config cannot be shortened")
        layers = tuple(model.get_submodule(self.layers.path).children())
        short = replace(self.layers.first(count), layers=layers)
        return SampledModel(model, short, min(count, self.count), self.sources)

    def short(self) -> PreTrainedModel:
        """The model with only the layers that have weights.

        Raises:
            NotSampled: Its config has no place for their number.
        """
        return self.first(self.count).model


def sample_model(
    folder: Path,
    held: Mapping[str, Weight],
    read: Callable[[Mapping[str, torch.Tensor]], PreTrainedModel],
    choose: Callable[[LayerList], int],
) -> SampledModel:
    """Load a checkpoint, with weights for its first layers only.

    Args:
        folder: The checkpoint.
        held: Its weights (`checkpoint_tensors`).
        read: Loads it from the tensors in place of its files' (`transformers_model.read_model`).
        choose: Number of layers to load, from all of them; with none, no stored weight is loaded.

    Raises:
        NotSampled: It has no list of layers, or is not stored as plain safetensors.
    """
    if not held:
        raise NotSampled("it has no safetensors files")
    compared = _compared(folder, held)
    model = read({k: s.read() if k in compared else _unread(s) for k, s in held.items()}).eval()
    layers = find_layer_list(model)
    if layers is None:
        raise NotSampled("it has no list of layers")
    count = choose(layers)
    paths = [f"{layers.path}.{index}." for index in range(len(layers.layers))]
    absent = tuple(paths[count:])
    sources = WeightSources(aliases=aliases_of(model), make=converter_of(model))
    pieces: dict[str, torch.Tensor] = {}
    for key, (target, converted) in model_names(model, held).items():
        if not converted:
            sources.stored[target] = held[key]
            continue
        layer = next((path for path in paths if target.startswith(path)), None)
        if layer is not None:
            sources.made.setdefault(layer.removesuffix("."), []).append(held[key])
        if layer not in absent:
            pieces[key] = held[key].read()
    _read_weights(model, sources, pieces, absent, stored=count > 0)
    layers = find_layer_list(model)  # again, since buffers that are read may set layers apart
    assert layers is not None  # noqa: S101 (see above)
    return SampledModel(model, layers, count, sources)


#: A key with a number in it: of a layer, as a rule.
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


class _Unread(torch.Tensor):
    """A tensor on the meta device that stays there, to whatever device it is moved."""

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]  # noqa: ARG002
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def _compared(folder: Path, held: Mapping[str, Weight]) -> set[str]:
    """The tensors that ``from_pretrained`` may compare: tied ones, stored twice; no layer's are."""
    config = read_config_file(folder)
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    if not any(one.get("tie_word_embeddings", one is config) for one in nested):
        return set()
    by_kind: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, stored in held.items():
        if not _NUMBERED.search(key):
            by_kind.setdefault((stored.dtype, stored.shape), []).append(key)
    return {key for keys in by_kind.values() if len(keys) > 1 for key in keys}


def _unread(stored: Weight) -> torch.Tensor:
    """A tensor for ``from_pretrained`` with its shape and dtype, on the meta device."""
    dtype = getattr(torch, TORCH_DTYPES[stored.dtype])
    empty = torch.empty(stored.shape, dtype=dtype, device="meta")
    return empty.as_subclass(_Unread)


def _read_weights(
    model: PreTrainedModel,
    sources: WeightSources,
    pieces: Mapping[str, torch.Tensor],
    absent: tuple[str, ...],
    *,
    stored: bool,
) -> None:
    """Set the weights of a model that are on the meta device, but for those of absent layers.

    Without ``stored``, only those that the checkpoint does not store as such.
    """
    assert sources.make is not None  # noqa: S101 (set where the sources are)
    made = sources.make(pieces) if pieces else {}
    buffers = dict(model.named_buffers())
    wanted: dict[str, Weight | None] = {}
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        names = sources.aliases.get(name, (name,))
        left_out = name not in buffers and all(alias.startswith(absent) for alias in names)
        if left_out or not tensor.is_meta:
            continue
        source = sources.find(name)
        if source is None and name not in made:
            raise NotSampled(f"where {name} comes from is not known")
        if source is not None and not stored and name not in buffers:
            continue
        wanted[name] = source
    tensors = {**dict(model.named_parameters()), **buffers}
    converted = {name for name, one in wanted.items() if not _is_mapped(one, tensors[name].dtype)}
    large = sum(tensors[name].nbytes for name in converted) >= LARGE
    with closing(Scratch()) if large else nullcontext() as scratch:
        for name, source in wanted.items():
            tensor = tensors[name]
            if scratch is not None and name in converted:
                blocks = [made.pop(name)] if source is None else source.blocks()
                value = scratch.put(blocks, tuple(tensor.shape), tensor.dtype)
            else:
                value = (made[name] if source is None else source.read()).to(tensor.dtype)
            if name not in buffers:
                value = nn.Parameter(value, tensor.requires_grad)
            for alias in sources.aliases.get(name, (name,)):
                path, _, last = alias.rpartition(".")
                setattr(model.get_submodule(path), last, value)


def _is_mapped(source: Weight | None, dtype: torch.dtype) -> bool:
    """Whether a weight is mapped from the checkpoint's file, and not converted."""
    return isinstance(source, StoredWeight) and TORCH_DTYPES[source.dtype] == dtype_name(dtype)


#: At least two layers are loaded, so that the second runs on what the first gives.
_FEWEST = 2


def enough_layers(layers: LayerList) -> int:
    """How many layers to load: every kind among them."""
    return min(len(layers.layers), max(_FEWEST, prefix_with_every_kind(layers.kinds)))


def all_layers(layers: LayerList) -> int:
    """Load all layers, that is, map and run them."""
    return len(layers.layers)


def at_most(count: int, layers: LayerList) -> int:
    """``count``, or all layers where there are fewer."""
    return min(count, len(layers.layers))
