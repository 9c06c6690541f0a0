"""The reference of a verification by layer: PyTorch, with the weights of one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.shared_change import one_model_at_a_time
from qeff_proxy.cut.cut_model import cut_model, site_weights
from qeff_proxy.layers.taps import first_tensor, layers_of
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.transformers_model import NotSampled
from qeff_proxy.load.weight_sources import WeightSources
from qeff_proxy.parts import Kind, Part, Proxy
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.verify.rounding import RoundedModule

#: The place of a layer's hidden states in its output.
_HIDDEN = -1


class Weights:
    """The weights of a model, which are in memory only while they are used.

    At other times a parameter has the right shape and no memory of its own: one zero stands for all
    elements.

    Args:
        model: Its parameters are emptied, but for those whose source is not known.
        sources: Where they come from.
    """

    def __init__(self, model: nn.Module, sources: WeightSources) -> None:
        self._sources = sources
        self._names: dict[int, str] = {}
        #: Those of the embedding and the LM head: no other part of a split proxy uses them, which
        #: the export made sure of.
        self.vocabulary: Set[str] = frozenset()
        for name, parameter in list(model.named_parameters()):
            made = any(name.startswith(f"{path}.") for path in sources.made)
            if sources.find(name) is None and not made:
                continue
            empty = nn.Parameter(_empty_like(parameter), requires_grad=False)
            self._names[id(empty)] = name
            for alias in sources.aliases.get(name, (name,)):
                path, _, last = alias.rpartition(".")
                setattr(model.get_submodule(path), last, empty)

    def used_by(self, part: Part) -> list[nn.Parameter]:
        """The parameters that a part uses."""
        unused = self.vocabulary if part.weights != "vocabulary" else frozenset()
        return [p for p in part.module.parameters() if self._names.get(id(p)) not in unused]

    @contextmanager
    def reading(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Give parameters their weights while the context is open."""
        absent = {self._names[id(p)]: p for p in parameters if id(p) in self._names}
        absent = {name: p for name, p in absent.items() if p.untyped_storage().nbytes() <= 8}
        stored = {name: self._sources.find(name) for name in absent}
        made = [name for name, found in stored.items() if found is None]
        try:
            for name, found in stored.items():
                if found is not None:
                    absent[name].data = found.read().to(absent[name].dtype)
            for weights in self._sources.make_layers(made):
                for name, weight in weights.items():
                    absent[name].data = weight.to(absent[name].dtype)
            yield
        finally:
            for parameter in absent.values():
                parameter.data = _empty_like(parameter)


def _empty_like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)


@one_model_at_a_time
def reference_parts(
    loaded: LoadedModel, hooks: Hooks, export: Export
) -> tuple[Proxy, Weights | None]:
    """The parts of a model in PyTorch, and what reads their weights.

    Returns:
        The parts; and ``None`` where all weights are in memory, since the model is or cannot be
        read layer by layer.
    """
    kind = cast("Kind", export.kind)
    if loaded.sample is None or loaded.is_read:
        return cut_model(loaded, hooks, kind, verify=False).proxy, None
    try:
        sampled = loaded.sample(lambda _layers: 0)
    except NotSampled:
        return cut_model(loaded, hooks, kind, verify=False).proxy, None
    weights = Weights(sampled.model, sampled.sources)
    empty = replace(loaded, read=lambda: sampled.model)
    cut = cut_model(empty, hooks, kind, verify=False)
    if kind == "split":
        weights.vocabulary = set().union(*(site_weights(empty, s) for s in cut.sites.values()))
    return cut.proxy, weights


class PartReference:
    """A part in PyTorch, run layer by layer.

    Args:
        part: The live part.
        weights: Reads its weights; ``None`` where they are in memory.
    """

    def __init__(self, part: Part, weights: Weights | None) -> None:
        layers = layers_of(part)
        listed = layers.layers if layers is not None else ()
        inside = {id(p) for layer in listed for p in layer.parameters()}
        used = weights.used_by(part) if weights is not None else ()
        self._outside = [p for p in used if id(p) not in inside]
        self._weights = weights
        self._stack = ExitStack()
        self._module = _OneLayer(part.module, listed, self._use)
        self._part = replace(part, module=self._module)
        self._used: nn.Module | None = None

    def run(
        self, feeds: Mapping[str, Array], stage: int, names: Set[str], bits: int | None = None
    ) -> dict[str, Array]:
        """Run one layer.

        Args:
            feeds: The part's inputs and, but for the first, the output of the layer before.
            stage: The layer, or how many there are for what comes after the last.
            names: Its outputs; the layer's own is ``hidden_states.<stage>``.
            bits: Round what each operator computes to so many significant bits.

        Returns:
            The outputs of these names.
        """
        self._module.stage = stage
        self._module.names = names
        module = self._module if bits is None else RoundedModule(self._module, bits)
        return TorchSession(replace(self._part, module=module)).run(feeds)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the weights outside of the layers, and of the one that runs, while it is open."""
        with self._stack:
            self._used = None
            if self._weights is not None:
                self._stack.enter_context(self._weights.reading(self._outside))
            yield

    def _use(self, layer: nn.Module) -> None:
        """Hold the weights of the layer that runs."""
        if self._weights is not None and self._used is not layer:
            self._stack.enter_context(self._weights.reading(layer.parameters()))
            self._used = layer


class _OneLayer(nn.Module):
    """A part's module of which only one layer runs.

    The layers before it return the value that is passed for the output of the last of them, those
    after it their input. All code between the layers runs as ever. A layer that hands on more than
    hidden states to later ones, such as a bias of positions, runs again for each of them.
    """

    def __init__(self, module: nn.Module, layers: Iterable[nn.Module], use: Any) -> None:
        super().__init__()
        self.module = module
        self.stage = 0
        self.names: Set[str] = frozenset()
        self._use = use
        self._listed = tuple(dict.fromkeys(layers))
        #: By layer: for each item of its output, which of its arguments it is, `_HIDDEN` for its
        #: hidden states or ``None``; ``None`` for the whole where it has but these.
        self._forms: dict[int, list[int | None] | None] = {}
        self._handing_on: set[int] = set()

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module's layer ``stage``; see `PartReference.run`."""
        before = tensors.pop(f"hidden_states__{self.stage - 1}", None)
        seen: dict[str, torch.Tensor] = {}
        calls = iter(range(1 << 30))  # by calls, as taps count: a layer may run several times
        made: set[int] = set()

        def gate(layer: nn.Module, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                number = next(calls)
                given = (*args, *kwargs.values())
                if number > self.stage:
                    if not made.isdisjoint(map(id, given)):
                        self._handing_on.add(self.stage)
                    return self._formed(self.stage, first_tensor(given), given)
                if number < self.stage and number in self._forms.keys() - self._handing_on:
                    return self._formed(number, before, given)
                self._use(layer)
                output = forward(*args, **kwargs)
                hidden = first_tensor(output)
                assert hidden is not None  # noqa: S101 (or it would have no tap)
                form = _form_of(output, hidden, given)
                self._forms[number] = form
                items = list(zip(output, form, strict=True)) if form is not None else []
                if number < self.stage:
                    handed = tuple(before if at == _HIDDEN else item for item, at in items)
                    return before if form is None else handed
                made.update(id(one) for one, at in items if at is None and one is not None)
                seen[f"hidden_states.{number}"] = hidden.clone()
                return output

            return run

        try:
            for layer in self._listed:
                vars(layer)["forward"] = gate(layer, layer.forward)
            outputs = self.module(**tensors)
        finally:
            for layer in self._listed:
                vars(layer).pop("forward", None)
        return {name: t for name, t in {**outputs, **seen}.items() if name in self.names}

    def _formed(self, number: int, hidden: torch.Tensor | None, given: Sequence[Any]) -> Any:
        """Hidden states in the form in which a layer returns them."""
        form = self._forms[number]
        if form is None:
            return hidden
        return tuple(
            hidden if at == _HIDDEN else given[at] if at is not None and at < len(given) else None
            for at in form
        )


def _form_of(output: Any, hidden: torch.Tensor, given: Sequence[Any]) -> list[int | None] | None:
    """Which of a layer's arguments each item of its output is (`_OneLayer`)."""
    if not isinstance(output, tuple):
        return None
    places = {id(one): at for at, one in enumerate(given) if isinstance(one, torch.Tensor)}
    return [_HIDDEN if item is hidden else places.get(id(item)) for item in output]
