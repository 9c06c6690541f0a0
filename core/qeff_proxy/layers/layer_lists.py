"""Find the layers of a model, and tell which are alike.

Two layers are of one kind if they run the same code, with the same settings, on weights of the same
shapes: equal in every module, shape, constant and setting except their index. A floating-point
buffer that a checkpoint stores is a weight, any other buffer a constant. Nothing here knows an
architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from qeff_proxy.arrays import to_array
from qeff_proxy.layers.index_use import INDEX_NAMES, keeps_index, uses_index

ModuleT = TypeVar("ModuleT", bound=nn.Module)


#: Shorter lists are traced layer by layer.
_FEWEST = 3


@dataclass(frozen=True)
class LayerList:
    """The list of a model's layers.

    Attributes:
        path: Dotted path of the list in the module that was searched.
        layers: Its members.
        kinds: The kind of each, numbered in the order in which the kinds first occur.
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[int, ...]

    def first(self, count: int) -> LayerList:
        """The list of the first ``count`` layers."""
        return LayerList(self.path, self.layers[:count], self.kinds[:count])


def find_layer_list(
    module: nn.Module,
    depth: int | None = None,
    types: tuple[type[nn.ModuleList] | type[nn.Sequential], ...] = (nn.ModuleList,),
) -> LayerList | None:
    """The list of layers in ``module``.

    It is the list as long as the cache is deep, before all one whose layers keep their index, as
    layers with a cache do; else the list with the most parameters.

    Args:
        module: A model or a part of one.
        depth: Number of layers that have a cache; 0 where that is not known. By default that of
            the text decoder in the module's config.
        types: What counts as a list.
    """
    if depth is None:
        depth = _decoder_depth(getattr(module, "config", None))
    lists = {
        path: tuple(members)
        for path, members in module.named_modules()
        if isinstance(members, types) and any(True for _ in members.parameters())
    }
    if not lists:
        return None
    sizes = {path: _size(members) for path, members in lists.items()}
    # Of lists of equal size, such as one that holds nothing but another, the outer comes first.
    path = max(sizes, key=sizes.__getitem__)
    indexed = {path for path in lists if _keep_index(lists[path])}
    fitting = [other for other in lists if len(lists[other]) == depth]
    best = max(fitting, key=lambda other: (other in indexed, sizes[other]), default=path)
    # Layers may share caches; a short list deep inside a layer is not the layers for that. Beside
    # the layers of the cache, others may be as large as they like: an image tower's.
    rivals = [path for path in lists if best not in indexed or best.startswith(f"{path}.")]
    path = best if all(4 * sizes[best] > sizes[other] for other in rivals) else path
    return LayerList(path, lists[path], _kinds(lists[path], _config_around(module, path)))


def _decoder_depth(config: Any) -> int:
    """The number of layers of a config's text decoder; 0 where it does not say.

    Of an encoder and a decoder either may be the layers: those of the larger are worth leaving out.
    """
    if getattr(config, "is_encoder_decoder", False):
        return 0
    try:
        text = config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # no config, or one with several
        return 0
    depth = getattr(text, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else 0


def _keep_index(layers: Sequence[nn.Module]) -> bool:
    """Whether each layer keeps its index, in itself or a module below it."""
    return all(any(map(keeps_index, layer.modules())) for layer in layers)


def layer_lists(module: nn.Module) -> Iterator[LayerList]:
    """The lists in ``module`` of which some members are alike; none of them within another.

    Lists whose members calculate with their index are left out.
    """
    taken: list[str] = []
    for path, members in module.named_modules():
        if not isinstance(members, nn.ModuleList | nn.Sequential) or len(members) < _FEWEST:
            continue
        if any(path.startswith(f"{outer}.") for outer in taken):
            continue
        layers = tuple(members)
        kinds = _kinds(layers, _config_around(module, path))
        if len(set(kinds)) < len(kinds) and not uses_index(layers):
            taken.append(path)
            yield LayerList(path, layers, kinds)


def _kinds(layers: Sequence[nn.Module], config: Any) -> tuple[int, ...]:
    """The kind of each layer, numbered in the order in which the kinds first occur."""
    settings = [value for _, value in sorted(per_layer_settings(config, len(layers)).items())]
    fingerprints = [
        f"{_fingerprint(layer)}|{[values[index] for values in settings]}"
        for index, layer in enumerate(layers)
    ]
    distinct = list(dict.fromkeys(fingerprints))
    return tuple(distinct.index(fingerprint) for fingerprint in fingerprints)


def _config_around(module: nn.Module, path: str) -> Any:
    """The config of the innermost module around ``path`` that has one, or ``None``."""
    names = path.split(".")[:-1]
    for end in range(len(names), -1, -1):
        config = getattr(module.get_submodule(".".join(names[:end])), "config", None)
        if config is not None:
            return config
    return None


def per_layer_settings(config: Any, depth: int) -> dict[str, Any]:
    """The lists of a config that have an entry for each layer, such as ``layer_types``."""
    if config is None:
        return {}
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == depth
    }


def prefix_with_every_kind(kinds: Sequence[int], times: int = 1) -> int:
    """Length of the shortest prefix that holds ``times`` layers of each kind, or all of a kind."""
    needed = {kind: min(times, list(kinds).count(kind)) for kind in set(kinds)}
    for length in range(len(kinds) + 1):
        if all(list(kinds[:length]).count(kind) >= count for kind, count in needed.items()):
            return length
    return len(kinds)


def describe_kinds(layers: LayerList) -> list[dict[str, Any]]:
    """One JSON object per kind: class, indices, attention or layer type, number of parameters."""
    described = []
    for kind in dict.fromkeys(layers.kinds):
        members = [index for index, other in enumerate(layers.kinds) if other == kind]
        layer = layers.layers[members[0]]
        words = [
            str(value)
            for module in layer.modules()
            for name in ("attention_type", "layer_type")
            if isinstance(value := vars(module).get(name), str)
        ]
        described.append(
            {
                "class": type(layer).__name__,
                "layers": members,
                "says": list(dict.fromkeys(words)),
                "parameters": _size([layer]),
            }
        )
    return described


def _size(layers: Sequence[nn.Module]) -> int:
    """Number of parameters, shared ones once."""
    sizes = {id(p): p.numel() for layer in layers for p in layer.parameters()}
    return sum(sizes.values())


def _fingerprint(layer: nn.Module) -> str:
    """Equal for two layers that run the same code on weights of the same shapes."""
    digest = hashlib.sha256()
    weights = stored_weights(layer)
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if name not in INDEX_NAMES
            and isinstance(value, bool | int | float | str | tuple | type(None))
        }
        digest.update(f"{path}|{type(module).__qualname__}|{sorted(settings.items())}".encode())
        for name, parameter in module.named_parameters(recurse=False):
            digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        for name, buffer in module.named_buffers(recurse=False):
            digest.update(f"{name}|{tuple(buffer.shape)}|{buffer.dtype}".encode())
            if not buffer.is_meta and id(buffer) not in weights:
                digest.update(to_array(buffer).tobytes())
    return digest.hexdigest()


def stored_weights(module: nn.Module) -> set[int]:
    """The `id` of each weight: parameters, and the floating-point buffers of its ``state_dict``."""
    return {
        id(tensor)
        for tensor in module.state_dict(keep_vars=True).values()
        if isinstance(tensor, nn.Parameter) or tensor.is_floating_point()
    }
