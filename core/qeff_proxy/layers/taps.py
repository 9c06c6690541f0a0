"""Layer taps: the outputs of each layer as extra outputs of a part.

After its own outputs, a part with taps has ``hidden_states.<layer>`` (the layer's output),
``hidden_states.<layer>.attention`` and ``hidden_states.<layer>.mlp`` (the outputs of its attention
and its MLP, before they are added to the residual stream). Layers count from 0 in the order in
which they run. Two dumps of tapped parts can be compared layer by layer.

A plugin need not know of taps: the layers are the members of the list of modules that is as long as
the part's cache is deep, or else of the one with the most parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.arguments import texts
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.layers.layer_lists import LayerList, find_layer_list
from qeff_proxy.parts import TAPS, Part, Proxy, TensorSpec

_NAMES = {
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(
        r"mlp|feed_?forward|(^|_)ffn?(_|\d|$)|(^|_)moe(_|$)|FeedForward|FFN|SparseMoe"
    ),
}
#: Modules whose names match the above, but that are something else.
_OTHERS = re.compile(
    r"norm|(^|_)ln(_|\d|$)|dropout|drop_path|scale|cross|encoder_at", re.IGNORECASE
)


def normalize_taps(taps: str | Iterable[str] | None) -> tuple[str, ...]:
    """The taps asked for, each once, in the order of `TAPS`.

    Args:
        taps: Names, or one string of them with commas between; ``None`` for none.

    Raises:
        UsageError: There is no such tap.
    """
    names = texts("taps", () if taps is None else taps)
    if isinstance(taps, str):
        names = taps.split(",")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if name not in TAPS:
            raise UsageError(f"there is no tap {name!r}", f"Known are {', '.join(TAPS)}.")
    return tuple(name for name in TAPS if name in names)


def tap_proxy(proxy: Proxy, taps: Sequence[str]) -> Proxy:
    """A proxy whose parts also return the outputs of their layers.

    Parts without layers are not changed (the vocabulary's never are); a part with a cache must have
    layers, and so must at least one part.

    Args:
        proxy: The parts; each is run once to learn the shapes of its layers' outputs.
        taps: Of `TAPS`; without any, ``proxy`` is returned.

    Raises:
        UnsupportedModelError: The layers, or the modules to tap in them, cannot be found.
    """
    if not taps:
        return proxy
    parts = []
    for part in proxy.parts:
        layers = layers_of(part)
        if layers is None and any(spec.name.startswith("present.") for spec in part.outputs):
            raise UnsupportedModelError(
                f"the layers of the {part.name} part cannot be found: no list of modules in it "
                "holds any",
                "Export without taps; caches of all layers are dumped without them too.",
            )
        parts.append(part if layers is None else _tapped(part, layers.layers, taps))
    if all(one is other for one, other in zip(parts, proxy.parts, strict=True)):
        raise UnsupportedModelError(
            f"no part has layers to tap (parts: {', '.join(part.name for part in parts)})",
            "Export without taps.",
        )
    return replace(proxy, parts=tuple(parts))


def layers_of(part: Part) -> LayerList | None:
    """The layers of a part that taps are for; ``None`` where it has none."""
    if part.weights == "vocabulary":
        return None
    depth = sum(spec.name.startswith("present.") for spec in part.outputs) // 2
    return find_layer_list(part.module, depth, (nn.ModuleList, nn.Sequential))


def find_tapped(layer: nn.Module, tap: str) -> nn.Module | None:
    """The module in a layer whose output is tapped, or ``None`` where there is none.

    It is the one nearest to the layer whose name, or whose class's name, says so; an MLP that is no
    module of its own ends with the layer's last projection outside of attention.
    """
    if tap == "layers":
        return layer
    found = _named(layer, _NAMES[tap])
    if found is not None or tap == "attention":
        return found
    attention = _named(layer, _NAMES["attention"])
    inside = {id(one) for one in attention.modules()} if attention is not None else set()
    others = {
        id(inner)
        for name, one in layer.named_modules()
        if _OTHERS.search(name.rpartition(".")[2])
        for inner in one.modules()
    }
    projections = [
        one for one in layer.modules() if _projects(one) and id(one) not in inside | others
    ]
    return projections[-1] if projections else None


class TappedPart(nn.Module):
    """A part's module that also returns the outputs of its layers.

    Args:
        module: The part's own module. It is not changed.
        layers: Its layers.
        taps: Of `TAPS`.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], taps: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.taps = tuple(taps)
        # In a tuple, so that the layers are not registered a second time.
        self.places = tuple(
            (layer, {tap: find_tapped(layer, tap) for tap in taps}) for layer in layers
        )

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module; its own outputs come first, then the tapped ones, layer by layer."""
        seen = _Seen()
        with seen.watching(self.places):
            outputs: Mapping[str, torch.Tensor] = self.module(**tensors)
        return {**outputs, **seen.tensors}


class _Seen:
    """The tapped outputs of one run of a part."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.layer = -1

    @contextmanager
    def watching(
        self, places: Sequence[tuple[nn.Module, Mapping[str, nn.Module | None]]]
    ) -> Iterator[None]:
        """Note the outputs of tapped modules while the context is open."""
        handles = []
        try:
            for layer, tapped in places:
                handles.append(layer.register_forward_pre_hook(self._next_layer))
                for tap, module in tapped.items():
                    if module is not None:
                        hook = self._noting(TAPS[tap])
                        handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _next_layer(self, *_: Any) -> None:
        # Counted by calls: a layer that a model runs several times has several depths.
        self.layer += 1

    def _noting(self, suffix: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                # A copy, since the model may go on to change the tensor in place.
                self.tensors[f"hidden_states.{self.layer}{suffix}"] = tensor.clone()

        return note


def _tapped(part: Part, layers: Sequence[nn.Module], taps: Sequence[str]) -> Part:
    """The part with its taps; run once to learn their names and shapes."""
    from qeff_proxy.session.sample_inputs import TRACE_SIZES, sample_inputs

    module = TappedPart(part.module, layers, taps).eval()
    for tap in taps:
        if all(tapped[tap] is None for _, tapped in module.places):
            raise UnsupportedModelError(
                f"no {tap} can be found in the layers of the {part.name} part "
                f"({type(layers[0]).__name__})",
                "Tap the layers only: taps='layers'.",
            )
    with torch.no_grad():
        outputs = module(**sample_inputs(part, {**TRACE_SIZES, **part.trace_sizes}))
    own = {spec.name for spec in part.outputs}
    # The trace tells which of these axes are dynamic.
    specs = [
        TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in outputs.items()
        if name not in own
    ]
    return replace(part, module=module, outputs=(*part.outputs, *specs))


def _named(layer: nn.Module, pattern: re.Pattern[str]) -> nn.Module | None:
    """The module nearest to ``layer`` of that name; of several projections the last."""
    level = list(layer.named_children())
    while level:
        found = [
            module
            for name, module in level
            if not _OTHERS.search(name)
            and not isinstance(module, nn.Dropout)
            and (pattern.search(name) or pattern.search(type(module).__name__))
            and any(True for _ in module.parameters())
        ]
        if found:
            return next((one for one in found if any(True for _ in one.children())), found[-1])
        level = [child for _, module in level for child in module.named_children()]
    return None


def _projects(module: nn.Module) -> bool:
    """Whether ``module`` is a projection: it has a matrix of its own and nothing below it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and not list(module.children())


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor of a layer's arguments or outputs, its hidden states."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    if not isinstance(values, tuple | list) and not hasattr(values, "__iter__"):
        return None
    return next((value for value in values if isinstance(value, torch.Tensor)), None)
