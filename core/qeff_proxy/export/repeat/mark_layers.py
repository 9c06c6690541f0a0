"""Trace one layer of each kind, where a module runs many.

While a part is traced within `marked_layers`, the first call of each kind of layer is traced
between marks (`qeff_proxy.export.repeat.marks`); later calls with the same signature become one
placeholder operator. The code around the layers is traced as usual, so that it does not matter how
a model goes through its layers, nor which of their outputs it uses.

The same signature means tensors of the same shapes and dtypes in the same places, and all other
arguments equal. The tensors that a layer reads and writes in a cache count as inputs and outputs,
and so do the outputs of modules in it that have hooks. A layer that does more, such as writing into
its inputs, cannot be repeated: `NotRepeatable` says why.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache

from qeff_proxy.export.repeat.layer_cache import LayerCache
from qeff_proxy.export.repeat.marks import enter, layer, leave
from qeff_proxy.layers.index_use import INDEX_NAMES
from qeff_proxy.layers.layer_lists import LayerList, layer_lists
from qeff_proxy.load.mapped_memory import PageHook

_SYMBOL = re.compile(r"\b[a-z]\w*\d\b")


class NotRepeatable(Exception):  # noqa: N818 (no error: all layers are traced)
    """A layer does more than its inputs and outputs show; says what."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer while a part was traced.

    Attributes:
        path: Dotted path of the layer in the part's module.
        module: The layer.
        template: Number of the call that was traced for it, perhaps its own.
    """

    path: str
    module: nn.Module
    template: int


@dataclass
class MarkedLayers:
    """The calls of layers in a trace or a run.

    Attributes:
        calls: The calls, by number, in order.
        axes: Symbol of a size → the name of the axis; symbols of one name are taken as equal.
        templates: Signature → the calls with it that were traced.
        inputs: In a run, the module's inputs, by name.
        given: In a run, the inputs of each call.
        left: In a run, the outputs of each call.
        runs: Whether it is a run.
    """

    calls: list[LayerCall] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    templates: dict[Any, list[_Template]] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    given: list[list[torch.Tensor]] = field(default_factory=list)
    left: list[Sequence[torch.Tensor]] = field(default_factory=list)
    runs: bool = False

    def begin(self) -> None:
        """Forget earlier calls: a trace begins, perhaps not the first."""
        self.calls.clear()
        self.axes.clear()
        self.templates.clear()


def layers_traced(calls: Sequence[LayerCall]) -> int:
    """How many layers were traced, in lists of which any layer was not."""
    numbered = list(enumerate(calls))
    repeated = {list_of(call) for number, call in numbered if call.template != number}
    return sum(call.template == number for number, call in numbered if list_of(call) in repeated)


def list_of(call: LayerCall) -> str:
    """Path of the list that the layer of a call is in."""
    return call.path.rpartition(".")[0]


@contextmanager
def marked_layers(
    module: nn.Module, lists: Iterable[LayerList] | None = None, *, runs: bool = False
) -> Iterator[MarkedLayers]:
    """Trace one layer of each kind of ``module`` while the context is open.

    Args:
        module: The module that is traced.
        lists: The lists of layers; by default all of which some members are alike.
        runs: The module is run instead of traced: one layer of each kind runs, and the others
            output random numbers.

    Raises:
        NotRepeatable: In the trace, from a layer that cannot be repeated.
    """
    marked = MarkedLayers(runs=runs)
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for layers in layer_lists(module) if lists is None else lists:
            for index, (member, kind) in enumerate(zip(layers.layers, layers.kinds, strict=False)):
                before = vars(member).get("forward")
                path = f"{layers.path}.{index}"
                call = _Call(path, member, (layers.path, kind), marked)
                vars(member)["forward"] = functools.wraps(member.forward)(call)
                changed.append((member, before))
        yield marked
    finally:
        for member, before in reversed(changed):
            if before is None:
                del vars(member)["forward"]
            else:
                vars(member)["forward"] = before


def is_absent(layer_module: nn.Module) -> bool:
    """Whether a layer's weights are not loaded."""
    return any(parameter.is_meta for parameter in layer_module.parameters())


@dataclass(frozen=True)
class _Template:
    """A call that was traced, and how its result is put together from its output tensors."""

    number: int
    index: int | None
    given: list[torch.Tensor]
    left: list[torch.Tensor]
    spec: pytree.TreeSpec
    results: list[Any]
    written: list[tuple[int, str, int]]
    seen: list[tuple[str, pytree.TreeSpec, list[Any]]]


@dataclass(frozen=True)
class _Tensor:
    """In a recipe: the output tensor of that number."""

    number: int


@dataclass(frozen=True)
class _Given:
    """In a recipe: the argument of that number, returned as it is."""

    number: int


class _Call:
    """The forward pass of a layer, while it is traced."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        kind: tuple[str, int],
        marked: MarkedLayers,
    ) -> None:
        self.path = path
        self.module = module
        self.kind = kind
        self.marked = marked
        self.forward: Callable[..., Any] = module.forward
        indices = {
            value
            for one in module.modules()
            for name in INDEX_NAMES
            if isinstance(value := vars(one).get(name), int)
        }
        self.index = indices.pop() if len(indices) == 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() == self.marked.runs:
            return self.forward(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        caches = [LayerCache(leaf, self.index) for leaf in leaves if isinstance(leaf, Cache)]
        held = [cache.tensors() for cache in caches]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        tensors += [tensor for one in held for tensor in one.values()]
        key = (
            self.kind,
            str(spec),
            *(_describe(leaf) for leaf in leaves),
            *((cache.plain(), *one) for cache, one in zip(caches, held, strict=True)),
            tuple(name for name, _ in self._watched()),
        )
        if self.marked.runs:
            self.marked.given.append(tensors)
        number = len(self.marked.calls)
        template = self._alike(key, tensors)
        if template is None:
            self.marked.calls.append(LayerCall(self.path, self.module, number))
            return self._trace(key, number, leaves, spec, caches, held, tensors)
        self.marked.calls.append(LayerCall(self.path, self.module, template.number))
        left = layer(tensors, template.left, number, template.number)
        return self._finish(template, left, leaves, caches)

    def _alike(self, key: Any, tensors: Sequence[torch.Tensor]) -> _Template | None:
        """The call that was traced with tensors of the same shapes and dtypes."""
        # A trace learns that sizes are equal as it goes on, so they are compared anew.
        shapes = [self._shape(tensor) for tensor in tensors]
        for template in self.marked.templates.get(key, ()):
            if [self._shape(tensor) for tensor in template.given] == shapes:
                return template
        return None

    def _shape(self, tensor: torch.Tensor) -> tuple[str, ...]:
        return (str(tensor.dtype), *(self._size(str(size)) for size in tensor.shape))

    def _size(self, size: str) -> str:
        names = self.marked.axes
        named = _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), size)
        return " + ".join(sorted(named.split(" + ")))

    def _trace(
        self,
        key: Any,
        number: int,
        leaves: list[Any],
        spec: pytree.TreeSpec,
        caches: Sequence[LayerCache],
        held: Sequence[Mapping[str, torch.Tensor]],
        tensors: list[torch.Tensor],
    ) -> Any:
        """Run the layer between marks; note what it writes into caches, refuse other effects."""
        entered = enter(tensors, number)
        versions = [tensor._version for tensor in entered]  # noqa: SLF001 (torch's only sign of it)
        arguments = entered[: len(entered) - sum(map(len, held))]  # the others are in caches
        remaining = iter(entered)
        inner = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        before = [dict(zip(one, remaining, strict=False)) for one in held]
        others = [cache.others() for cache in caches]
        plain = [cache.plain() for cache in caches]
        for cache, own in zip(caches, before, strict=True):
            cache.put(own)
        args, kwargs = pytree.tree_unflatten(inner, spec)
        with _watching(self._watched()) as seen:
            result = self.forward(*args, **kwargs)
        changed = {
            id(tensor)
            for tensor, version in zip(entered, versions, strict=True)
            if tensor._version != version  # noqa: SLF001
        }
        if any(id(tensor) in changed for tensor in arguments):
            raise NotRepeatable(f"{self.path} writes into its inputs")
        leaves_after, spec_after = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        if spec_after != spec or any(
            one is not other for one, other in zip(leaves_after, inner, strict=True)
        ):
            raise NotRepeatable(f"{self.path} changes the collections among its inputs")
        if others != [cache.others() for cache in caches]:
            raise NotRepeatable(f"{self.path} writes the cache of another layer")
        if not self.marked.runs and plain != [cache.plain() for cache in caches]:
            raise NotRepeatable(f"{self.path} changes more of the cache than tensors")
        collected: list[torch.Tensor] = []
        results, result_spec = self._recipe(result, inner, collected)
        written: list[tuple[int, str, int]] = []
        for at, (cache, own) in enumerate(zip(caches, before, strict=True)):
            for place, tensor in cache.tensors().items():
                if tensor is not own.get(place) or id(tensor) in changed:
                    written.append((at, place, len(collected)))
                    collected.append(tensor)
            cache.put(dict(held[at]))
        noted = []
        for name, output in seen:
            recipe, output_spec = self._recipe(output, inner, collected)
            noted.append((name, output_spec, recipe))
        left = leave(collected, number)
        template = _Template(
            number, self.index, tensors, left, result_spec, results, written, noted
        )
        self.marked.templates.setdefault(key, []).append(template)
        return self._finish(template, left, leaves, caches)

    def _recipe(
        self, value: Any, given: Sequence[Any], collected: list[torch.Tensor]
    ) -> tuple[list[Any], pytree.TreeSpec]:
        """How to put ``value`` together from its tensors, which are added to ``collected``."""
        leaves, spec = pytree.tree_flatten(value, is_leaf=_is_cache)
        recipe: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                recipe.append(_Tensor(len(collected)))
                collected.append(leaf)
                continue
            if isinstance(leaf, bool | int | float | str | type(None)):
                recipe.append(leaf)
                continue
            at = next((n for n, one in enumerate(given) if one is leaf), None)
            if at is None:
                raise NotRepeatable(f"{self.path} gives a {type(leaf).__name__}")
            recipe.append(_Given(at))
        return recipe, spec

    def _finish(
        self,
        template: _Template,
        left: Sequence[torch.Tensor],
        leaves: Sequence[Any],
        caches: Sequence[LayerCache],
    ) -> Any:
        """Put the result together, write the cache, and call the hooks of modules in the layer."""
        if self.marked.runs:
            self.marked.left.append(left)
            for cache in caches:
                cache.fill_as(template.index)
        for at, place, number in template.written:
            caches[at].put({place: left[number]})
        for name, spec, recipe in template.seen:
            module = self.module.get_submodule(name)
            output = pytree.tree_unflatten(_made(recipe, left, leaves), spec)
            for hook in _hooks_of(module):
                if hook(module, (), output) is not None:
                    raise NotRepeatable(f"a hook changes the output of {self.path}.{name}")
        return pytree.tree_unflatten(_made(template.results, left, leaves), template.spec)

    def _watched(self) -> list[tuple[str, nn.Module]]:
        """The modules in the layer that have hooks."""
        return [(name, one) for name, one in self.module.named_modules() if name and _hooks_of(one)]


def _hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of a module that take part in what is computed."""
    hooks = module._forward_hooks.values()  # noqa: SLF001 (their only register)
    return [hook for hook in hooks if not isinstance(hook, PageHook)]


@contextmanager
def _watching(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, Any]]]:
    """Note the outputs of modules; their own hooks are called after the layer."""
    seen: list[tuple[str, Any]] = []
    hooks = [(one, one._forward_hooks) for _, one in modules]  # noqa: SLF001
    try:
        for name, one in modules:
            kept = {n: h for n, h in one._forward_hooks.items() if isinstance(h, PageHook)}  # noqa: SLF001
            one._forward_hooks = OrderedDict(kept)  # noqa: SLF001
            one.register_forward_hook(functools.partial(_note, seen, name))
        yield seen
    finally:
        for one, own in hooks:
            one._forward_hooks = own  # noqa: SLF001


def _note(
    seen: list[tuple[str, Any]], name: str, _module: nn.Module, _given: Any, output: Any
) -> None:
    seen.append((name, output))


def _made(recipe: Sequence[Any], left: Sequence[torch.Tensor], given: Sequence[Any]) -> list[Any]:
    return [
        left[one.number]
        if isinstance(one, _Tensor)
        else given[one.number]
        if isinstance(one, _Given)
        else one
        for one in recipe
    ]


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def _describe(leaf: Any) -> str:
    """The part of a call's signature that an argument makes."""
    if isinstance(leaf, torch.Tensor):
        return "Tensor"
    if isinstance(leaf, bool | int | float | str | torch.SymInt | torch.dtype | type(None)):
        return f"{type(leaf).__name__} {leaf}"
    return f"{type(leaf).__name__} {id(leaf)}"
