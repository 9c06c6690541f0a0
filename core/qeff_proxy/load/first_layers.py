"""Load a model of which only the first few layers are there.

transformers builds the model, renames, converts and checks as ever; but the weights of the layers
beyond the sample never leave the disk, and are tensors on the meta device, and those of the sample
are mapped. So shapes, names, ties and what a checkpoint lacks are known of the whole model, at the
price of a few layers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_proxy.layers.index_use import uses_index
from qeff_proxy.layers.layer_lists import LayerList, find_layer_list, prefix_with_every_kind
from qeff_proxy.layers.shorten import shorten
from qeff_proxy.load.safetensors_header import TORCH_DTYPES, read_header
from qeff_proxy.load.weight_sources import (
    StoredWeight,
    WeightSources,
    aliases_of,
    converter_of,
    map_tensor,
)

__all__ = ["NotSampled", "SampledModel", "all_layers", "at_most", "enough_layers", "sampling"]


class NotSampled(Exception):  # noqa: N818 (no error: the whole model is loaded instead)
    """The model cannot be known by its first layers; says why."""


@dataclass
class SampledModel:
    """A model of which the first layers are there.

    Attributes:
        model: All of it; weights of layers beyond the sample are on the meta device.
        layers: Its layers.
        count: How many of them are there.
        sources: Where each weight comes from.
    """

    model: PreTrainedModel
    layers: LayerList
    count: int
    sources: WeightSources

    def check_alike(self) -> None:
        """Make sure that the layers that are there say what the others do.

        Raises:
            NotSampled: They may not.
        """
        if self.count == len(self.layers.layers):
            return
        if prefix_with_every_kind(self.layers.kinds) > self.count:
            raise NotSampled("its layers hold different constants")
        if uses_index(self.layers.layers):
            raise NotSampled("its layers calculate with their index")

    def first(self, count: int) -> SampledModel:
        """The model with its first ``count`` layers only.

        Raises:
            NotSampled: Its config cannot say so.
        """
        if count == len(self.layers.layers):
            return self
        model = shorten(self.model, self.layers, range(count))
        if model is None:
            raise NotSampled("its config cannot be shortened")
        path = self.layers.path
        layers = LayerList(
            path, tuple(model.get_submodule(path).children()), self.layers.kinds[:count]
        )
        return SampledModel(model, layers, min(count, self.count), self.sources)

    def short(self) -> PreTrainedModel:
        """The model with only the layers that are there.

        Raises:
            NotSampled: Its config cannot say so.
        """
        return self.first(self.count).model


class _Sampler:
    """What `sampling` notes while transformers loads."""

    def __init__(self, choose: Callable[[LayerList], int]) -> None:
        self.choose = choose
        self.layers: LayerList | None = None
        self.count = 0
        self.sources = WeightSources()

    def finish(self, model: PreTrainedModel) -> SampledModel:
        """The model that was loaded, with what is known of its weights.

        Raises:
            NotSampled: It cannot be known by its first layers.
        """
        if self.layers is None:
            raise NotSampled("it has no list of layers, or no safetensors files")
        found = find_layer_list(model, len(self.layers.layers))
        if found is None or found.path != self.layers.path:
            raise NotSampled("its layers cannot be found")
        self.sources.aliases = aliases_of(model)
        return SampledModel(model, found, self.count, self.sources)


@contextmanager
def sampling(choose: Callable[[LayerList], int]) -> Iterator[_Sampler]:
    """Let ``from_pretrained``, in this thread, load but the first layers of what it loads.

    Args:
        choose: Gives the number of layers to load, from the layers that there are.
    """
    sampler = _Sampler(choose)
    thread = threading.get_ident()
    original = PreTrainedModel._load_pretrained_model  # noqa: SLF001 (the one place to step in)

    def load(model: Any, state_dict: Any, files: Any, load_config: Any, **more: Any) -> Any:
        if threading.get_ident() == thread and state_dict is None and sampler.layers is None:
            state_dict = _state_dict(sampler, model, files, load_config)
        return original(model, state_dict, files, load_config, **more)

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # noqa: SLF001
    try:
        yield sampler
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)  # noqa: SLF001


class _Elsewhere:
    """Stands for a tensor that is not loaded: becomes one on the meta device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def __getitem__(self, _index: Any) -> _Elsewhere:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: ARG002
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def _state_dict(
    sampler: _Sampler, model: PreTrainedModel, files: list[str] | None, load_config: Any
) -> dict[str, Any] | None:
    """Tensors by key, as transformers would read them, but mapped or elsewhere."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    found = find_layer_list(model)
    if found is None or load_config.hf_quantizer is not None:
        return None
    count = sampler.choose(found)
    beyond = tuple(f"{found.path}.{index}." for index in range(count, len(found.layers)))
    sampler.layers, sampler.count = found, count
    held = {
        key: StoredWeight(Path(file), key, place)
        for file in files
        for key, place in read_header(Path(file)).items()
    }
    targets = _targets(model, list(held), load_config)
    buffers = {name for name, _ in model.named_buffers()}
    paths = [f"{found.path}.{index}" for index in range(len(found.layers))]
    state: dict[str, Any] = {}
    for key, stored in held.items():
        target, converted = targets[key]
        if converted:
            layer = next((path for path in paths if target.startswith(f"{path}.")), None)
            if layer is not None:
                sampler.sources.made.setdefault(layer, []).append(stored)
        else:
            sampler.sources.stored[target] = stored
        if target.startswith(beyond) and target not in buffers:
            dtype = getattr(torch, TORCH_DTYPES[stored.place.dtype])
            state[key] = _Elsewhere(stored.place.shape, dtype)
        else:
            state[key] = map_tensor(stored, sampler.sources.windows)
    sampler.sources.make = converter_of(model, load_config)
    return state


def _targets(
    model: PreTrainedModel, keys: list[str], load_config: Any
) -> dict[str, tuple[str, bool]]:
    """Key in the checkpoint → name in the model, and whether it is converted on the way.

    As ``transformers.core_model_loading.convert_and_load_state_dict_in_model`` does it.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = copy.deepcopy(load_config.weight_mapping or [])
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    own = model.state_dict()
    prefix = model.base_model_prefix
    targets = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if target not in own and key in own:
            target, pattern = rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=own
            )
        targets[key] = (target, pattern is not None)
    return targets


#: Layers that are loaded at least: two, so that what one hands to the next is run too.
_FEWEST = 2


def enough_layers(found: LayerList) -> int:
    """How many layers to load: every kind among them."""
    return min(len(found.layers), max(_FEWEST, prefix_with_every_kind(found.kinds)))


def all_layers(found: LayerList) -> int:
    """Load all layers: map them, that is, and run them."""
    return len(found.layers)


def at_most(count: int, found: LayerList) -> int:
    """``count``, or as many layers as there are."""
    return min(count, len(found.layers))
