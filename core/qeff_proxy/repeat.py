"""Trace once per kind of layer, and repeat by cloning.

Tracing dominates an export and grows with depth, although the layers of a decoder differ in little
but their weights. So:

1. `plan_repeat` sorts the layers into kinds: alike in every module, shape, buffer and setting
   except their index. The decoder is shortened to the first layer of each kind.
2. `qeff_proxy.trace.trace_part` traces the short part.
3. `qeff_proxy.clone_layers.expand` finds each kind's nodes by the module path that every node
   carries, and clones them for all layers in their order, with their own weights, cache and names.

Nothing here knows an architecture. Where the layers cannot be matched, the plan or the expansion
is ``None`` and the whole part is traced; the finished graph is held against the module either way
(`qeff_proxy.check_graph`).
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from qeff_proxy.arrays import to_array
from qeff_proxy.clone_layers import CACHE_NAME, expand
from qeff_proxy.decoder import DecoderPart
from qeff_proxy.errors import ExportError
from qeff_proxy.surgery import replace_modules
from qeff_proxy.trace import trace_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from qeff_proxy.parts import Part
    from qeff_proxy.trace import TracedPart

__all__ = ["RepeatPlan", "plan_repeat", "trace_repeated"]

_INDEX = "layer_idx"


@dataclass(frozen=True)
class RepeatPlan:
    """How a part is shortened and put together again.

    Attributes:
        part: The short part, to be traced.
        kinds: The kind of each layer of the full part, in order; kind *k* is layer *k* of the
            short one.
        scope: The module path of the list of layers in the short part.
        weights: For each layer, name of a weight of its kind's representative → its own name.
    """

    part: Part
    kinds: tuple[int, ...]
    scope: str
    weights: tuple[Mapping[str, str], ...]


def trace_repeated(
    part: Part,
    names: Mapping[int, str],
    tensors: Mapping[str, torch.Tensor],
    opset: int | None = None,
) -> tuple[TracedPart, int] | None:
    """Trace one layer of each kind, and clone it for the others.

    Args:
        part: The part to trace.
        names: ``id`` of each parameter and buffer of the uncut model → its name.
        tensors: The same tensors by name.
        opset: As in `qeff_proxy.trace.trace_part`.

    Returns:
        The whole part's graph and the number of layers traced for it; ``None`` where the part must
        be traced as it is.
    """
    plan = plan_repeat(part, names)
    if plan is None:
        return None
    try:
        short = trace_part(plan.part, names, opset)
    except ExportError:
        return None  # what the short part lacks, the whole one may have
    traced = expand(short, plan, part, tensors)
    return (traced, len(set(plan.kinds))) if traced is not None else None


def plan_repeat(part: Part, names: Mapping[int, str]) -> RepeatPlan | None:
    """Shorten a decoder part to one layer of each kind.

    Args:
        part: The part; nothing of it is changed.
        names: ``id`` of each parameter and buffer of the uncut model → its name.

    Returns:
        The plan, or ``None`` where the part is no decoder, or tracing it whole costs no more.
    """
    module = part.module
    if type(module) is not DecoderPart:
        return None
    found = _find_list(module.decoder, len(module.layout.cache))
    if found is None:
        return None
    path, layers = found
    marks = [_fingerprint(layer) for layer in layers]
    first = list(dict.fromkeys(marks))
    if len(layers) < len(first) + 2:
        return None
    kinds = tuple(first.index(mark) for mark in marks)
    representatives = [marks.index(mark) for mark in first]
    short = _shorten(module.decoder, path, layers, representatives)
    if short is None:
        return None
    layout = replace(
        module.layout, cache=tuple(module.layout.cache[index] for index in representatives)
    )
    keep = {
        f"{prefix}.{index}.{side}"
        for prefix in ("past_key_values", "present")
        for index in range(len(representatives))
        for side in ("key", "value")
    }
    short_part = replace(
        part,
        module=DecoderPart(short, layout, module.entry, module.exit_name).eval(),
        inputs=tuple(s for s in part.inputs if not CACHE_NAME.fullmatch(s.name) or s.name in keep),
        outputs=tuple(
            s for s in part.outputs if not CACHE_NAME.fullmatch(s.name) or s.name in keep
        ),
    )
    weights = tuple(
        _weight_names(layers[representatives[kind]], layer, names)
        for kind, layer in zip(kinds, layers, strict=True)
    )
    return RepeatPlan(short_part, kinds, f"decoder.{path}", weights)


def _find_list(decoder: nn.Module, depth: int) -> tuple[str, list[nn.Module]] | None:
    """The list of the layers: the one with the most parameters of those as long as the cache."""
    lists = [
        (path, list(one))
        for path, one in decoder.named_modules()
        if isinstance(one, nn.ModuleList) and len(one) == depth
    ]
    return max(lists, key=lambda item: _size(item[1]), default=None)


def _size(layers: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _fingerprint(layer: nn.Module) -> str:
    """Equal for two layers that run the same code on weights of the same shapes."""
    digest = hashlib.sha256()
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if name != _INDEX and isinstance(value, bool | int | float | str | tuple | type(None))
        }
        digest.update(f"{path}|{type(module).__qualname__}|{sorted(settings.items())}".encode())
        for name, parameter in module.named_parameters(recurse=False):
            digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        for name, buffer in module.named_buffers(recurse=False):
            digest.update(f"{name}|{tuple(buffer.shape)}|{buffer.dtype}".encode())
            if not buffer.is_meta:
                digest.update(to_array(buffer).tobytes())
    return digest.hexdigest()


def _shorten(
    decoder: nn.Module, path: str, layers: Sequence[nn.Module], representatives: Sequence[int]
) -> nn.Module | None:
    """A copy of the decoder that has the representatives for layers, or ``None``."""
    chosen = [
        _with_index(layers[index], position) for position, index in enumerate(representatives)
    ]
    short = replace_modules(decoder, {path: nn.ModuleList(chosen)})
    config = copy.deepcopy(getattr(decoder, "config", None))
    if config is None:
        return short
    layer_types = getattr(config, "layer_types", None)
    try:
        if layer_types is not None:
            config.layer_types = [layer_types[index] for index in representatives]
        config.num_hidden_layers = len(representatives)
    except (ValueError, TypeError, AttributeError):
        return None
    short.config = config
    return short


def _with_index(layer: nn.Module, position: int) -> nn.Module:
    """The layer as if it stood at ``position``."""
    changes: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        if path and isinstance(vars(module).get(_INDEX), int):
            clone = replace_modules(module, {})
            setattr(clone, _INDEX, position)
            changes[path] = clone
    result = replace_modules(layer, changes)
    if isinstance(vars(result).get(_INDEX), int):
        setattr(result, _INDEX, position)
    return result


def _weight_names(
    representative: nn.Module, layer: nn.Module, names: Mapping[int, str]
) -> dict[str, str]:
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    theirs = {**dict(representative.named_parameters()), **dict(representative.named_buffers())}
    return {
        names[id(theirs[name])]: names[id(own[name])]
        for name in theirs
        if id(theirs[name]) in names and id(own[name]) in names
    }
