"""Where each weight of a model comes from: one tensor in a checkpoint's files, or several.

Most tensors of a checkpoint are weights of the model byte for byte, perhaps under another name. The
other weights are made of several tensors, or of a part of one (fused experts, split projections),
by transformers' own conversions; they are made layer by layer, and freed again.

A checkpoint may also store a weight as codes and scales, or as a change to another one. Such a
weight is computed from its tensors when it is read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.load.quantized.arithmetic import join
from qeff_proxy.load.safetensors_header import TORCH_DTYPES, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a checkpoint: its file, its name there and where it lies."""

    path: Path
    key: str
    place: StoredTensor

    @property
    def dtype(self) -> str:
        """The format's name of its dtype (a key of `TORCH_DTYPES`)."""
        return self.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.place.shape

    def read(self) -> torch.Tensor:
        """The tensor, mapped (`map_tensor`)."""
        return map_tensor(self)


@dataclass(frozen=True)
class Codes:
    """What ONNX's ``DequantizeLinear`` needs to compute a weight [rows, columns] from codes.

    Attributes:
        bits: Of a code: 4 or 8, without a sign.
        size: Columns that share a scale and a zero point.
        words: The codes, U8 [rows, columns · bits / 8], the first in the lower bits.
        scales: [rows, groups] of the weight's dtype.
        zeros: U8 [rows · groups · bits / 8], as the codes.
    """

    bits: int
    size: int
    words: ComputedWeight
    scales: ComputedWeight
    zeros: ComputedWeight


@dataclass(frozen=True, eq=False)
class ComputedWeight:
    """A weight that is computed from tensors of a checkpoint, such as codes and their scales.

    Attributes:
        key: Its name, as if the checkpoint stored it.
        dtype: Of the result: a key of `TORCH_DTYPES`.
        shape: Of the result.
        pieces: What it is computed from.
        compute: Gives it, or its elements in order in blocks, from the pieces in their order.
        codes: Gives the codes that it can be computed from in a graph, if there are such.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Weight, ...]
    compute: Callable[..., torch.Tensor | Iterator[torch.Tensor]]
    codes: Callable[[], Codes | None] | None = None

    @property
    def path(self) -> Path:
        """The file of its first piece."""
        return self.pieces[0].path

    def read(self) -> torch.Tensor:
        """The weight, in memory of its own."""
        value = self.compute(*(piece.read() for piece in self.pieces))
        if isinstance(value, torch.Tensor):
            return value
        return join(self._trimmed(value), self.shape, getattr(torch, TORCH_DTYPES[self.dtype]))

    def blocks(self) -> Iterator[torch.Tensor]:
        """Its elements in order, in blocks that need less memory than all of it."""
        value = self.compute(*(piece.read() for piece in self.pieces))
        yield from (value,) if isinstance(value, torch.Tensor) else self._trimmed(value)

    def _trimmed(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Blocks without what is beyond the last element: formats fill up their last one."""
        left = math.prod(self.shape)
        for block in blocks:
            yield block.reshape(-1)[:left]
            left -= min(left, block.numel())


#: A weight of a checkpoint, as it is named there.
Weight = StoredWeight | ComputedWeight


def map_tensor(stored: StoredWeight) -> torch.Tensor:
    """A tensor of a file without a copy: pages are read when they are used.

    Whoever writes to it writes to a copy of the page; the file never changes.
    """
    place = stored.place
    dtype = getattr(torch, TORCH_DTYPES[place.dtype])
    if place.length == 0:
        return torch.empty(place.shape, dtype=dtype)
    # No more than the tensor is mapped: a writable mapping counts as memory that may be needed.
    before = place.offset % mmap.ALLOCATIONGRANULARITY
    with stored.path.open("rb") as file:
        window = mmap.mmap(
            file.fileno(),
            before + place.length,
            access=mmap.ACCESS_COPY,
            offset=place.offset - before,
        )
    flat = torch.frombuffer(window, dtype=torch.uint8, count=place.length, offset=before)
    if place.offset % dtype.itemsize:
        flat = flat.clone()  # kernels want whole elements
    return flat.view(dtype).reshape(place.shape)


@dataclass
class WeightSources:
    """Where the weights of a model come from, by their names in the model.

    Attributes:
        stored: Weights that are tensors of the checkpoint, or computed from some.
        made: Module path of a layer → the tensors that its other weights are made of. Those of
            weights outside of the layers, which are loaded with the model, are not among them.
        make: Converts such tensors to weights, as transformers does.
        aliases: Name of a weight → all its names in the model.
    """

    stored: dict[str, Weight] = field(default_factory=dict)
    made: dict[str, list[Weight]] = field(default_factory=dict)
    make: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, name: str) -> Weight | None:
        """The tensor that this weight is stored as, under any of its names."""
        for alias in (name, *self.aliases.get(name, ())):
            if alias in self.stored:
                return self.stored[alias]
        return None

    def file_of(self, name: str) -> Path | None:
        """A file that holds the weight, or the first tensor it is made of."""
        stored = self.find(name) or next(
            (pieces[0] for path, pieces in self.made.items() if name.startswith(f"{path}.")), None
        )
        return stored.path if stored is not None else None

    def make_layers(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Make weights that the checkpoint does not store as such, layer by layer.

        Raises:
            KeyError: The tensors that a weight is made of are not known.
        """
        by_layer: dict[str, set[str]] = {}
        for name in names:
            path = next((path for path in self.made if name.startswith(f"{path}.")), None)
            if path is None:
                raise KeyError(name)
            by_layer.setdefault(path, set()).add(name)
        for path, members in by_layer.items():
            assert self.make is not None  # noqa: S101 (set together with ``made``)
            made = self.make({piece.key: piece.read() for piece in self.made[path]})
            missing = members - set(made)
            if missing:
                raise KeyError(min(missing))
            yield {name: made[name] for name in sorted(members)}


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter → all its names: more than one if it is tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def model_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Key in a checkpoint → name in the model, and whether its tensor is converted on the way.

    As ``transformers.core_model_loading.convert_and_load_state_dict_in_model`` names them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    names = model.state_dict()
    prefix = model.base_model_prefix
    targets = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=names
            )
        targets[key] = (target, pattern is not None)
    return targets


def converter_of(
    model: PreTrainedModel,
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A function that converts tensors of a checkpoint to weights of a model.

    Args:
        model: The model; the function sets its weights and restores them.
    """

    def make(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        # Without a dtype, each weight gets that of the parameter it is for.
        config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model))
        before = dict(model.named_parameters(remove_duplicate=False))
        with quiet_loading():
            convert_and_load_state_dict_in_model(model, dict(tensors), config)
        after = dict(model.named_parameters(remove_duplicate=False))
        made = {name: weight for name, weight in after.items() if weight is not before.get(name)}
        for name in made:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, before[name])
        return {name: parameter.detach() for name, parameter in made.items()}

    return make
