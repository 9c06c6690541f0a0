"""Trace once per kind of layer, and repeat by cloning.

Tracing dominates an export and grows with depth, although the layers of a decoder differ in little
but their weights. So:

1. `plan_repeat` takes the layers and their kinds (`qeff_proxy.layer_kinds`) and shortens the part
   to the first layer of each kind.
2. `qeff_proxy.trace.trace_part` traces the short part.
3. `qeff_proxy.clone_layers.expand` finds each kind's nodes by the module path that every node
   carries, and clones them for all layers in their order, with their own weights, cache and names.

The layers that a part is expanded to need not be in it: a part that holds the first few layers of a
model can be expanded to all of them. Where the layers cannot be matched, the plan or the expansion
is ``None``, and the caller traces the whole part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qeff_proxy.clone_layers import LAYER_NAME, expand
from qeff_proxy.decoder import DecoderPart
from qeff_proxy.errors import ExportError
from qeff_proxy.layer_kinds import find_layer_list, shorten
from qeff_proxy.taps import TappedPart
from qeff_proxy.trace import trace_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from qeff_proxy.layer_kinds import LayerList
    from qeff_proxy.parts import Part, TensorSpec
    from qeff_proxy.trace import TracedPart

__all__ = ["RepeatPlan", "deepen", "plan_repeat", "trace_repeated"]


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

    def first(self, count: int) -> RepeatPlan:
        """The plan for the first ``count`` layers only."""
        return replace(self, kinds=self.kinds[:count], weights=self.weights[:count])


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
        be traced as it is, or where that costs no more.
    """
    plan = plan_repeat(part, names)
    if plan is None or len(plan.kinds) < len(set(plan.kinds)) + 2:
        return None
    try:
        short = trace_part(plan.part, names, opset)
    except ExportError:
        return None  # what the short part lacks, the whole one may have
    traced = expand(short, plan, part, tensors)
    return (traced, len(set(plan.kinds))) if traced is not None else None


def plan_repeat(
    part: Part, names: Mapping[int, str], whole: LayerList | None = None
) -> RepeatPlan | None:
    """Shorten a decoder part to one layer of each kind.

    Args:
        part: The part; nothing of it is changed.
        names: ``id`` of each parameter and buffer of the uncut model → its name.
        whole: All the layers that the part is to be expanded to, where it holds but the first of
            them, every kind among these.

    Returns:
        The plan, or ``None`` where the part is no decoder whose layers can be told apart.
    """
    tapped = part.module if isinstance(part.module, TappedPart) else None
    module = tapped.module if tapped is not None else part.module
    if type(module) is not DecoderPart:
        return None
    own = find_layer_list(module.decoder, len(module.layout.cache))
    if own is None:
        return None
    whole = whole or own
    if not _begins_with(whole, own):
        return None
    chosen = [whole.kinds.index(kind) for kind in range(len(set(whole.kinds)))]
    short = shorten(module.decoder, own, chosen)
    if short is None:
        return None
    layout = replace(module.layout, cache=tuple(module.layout.cache[index] for index in chosen))
    short_module: nn.Module = DecoderPart(short, layout, module.entry, module.exit_name)
    scope = f"decoder.{own.path}"
    if tapped is not None:
        if len(tapped.places) != len(own.layers):
            return None
        layers = tuple(short.get_submodule(own.path).children())
        short_module = TappedPart(short_module, layers, tapped.taps)
        scope = f"module.{scope}"
    short_part = replace(
        part,
        module=short_module.eval(),
        inputs=_specs_of(part.inputs, chosen),
        outputs=_specs_of(part.outputs, chosen),
    )
    weights = tuple(
        _weight_names(whole.layers[chosen[kind]], layer, names)
        for kind, layer in zip(whole.kinds, whole.layers, strict=True)
    )
    return RepeatPlan(short_part, whole.kinds, scope, weights)


def deepen(part: Part, kinds: Sequence[int]) -> Part:
    """The part with the inputs and outputs that it has when it is expanded to all layers.

    Args:
        part: A part that holds the first layers, every kind among them. Its module stays.
        kinds: The kind of each layer.
    """
    chosen = [kinds.index(kind) for kind in kinds]
    return replace(
        part, inputs=_specs_of(part.inputs, chosen), outputs=_specs_of(part.outputs, chosen)
    )


def _specs_of(specs: Sequence[TensorSpec], chosen: Sequence[int]) -> tuple[TensorSpec, ...]:
    """The specs with those of the chosen layers, renumbered, where those of all layers were."""
    result: list[TensorSpec] = []
    done: set[str] = set()
    for spec in specs:
        match = LAYER_NAME.fullmatch(spec.name)
        if match is None:
            result.append(spec)
            continue
        family = match[1]
        if family in done:
            continue
        done.add(family)
        for position, index in enumerate(chosen):
            for one in specs:
                found = LAYER_NAME.fullmatch(one.name)
                if found is not None and found[1] == family and int(found[2]) == index:
                    result.append(replace(one, name=f"{family}.{position}{found[3]}"))
    return tuple(result)


def _begins_with(whole: LayerList, own: LayerList) -> bool:
    """Whether the part's layers are the first of all, by their very weights."""
    if len(own.layers) > len(whole.layers):
        return False
    return all(
        [id(p) for p in one.parameters()] == [id(p) for p in other.parameters()]
        for one, other in zip(own.layers, whole.layers, strict=False)
    )


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
