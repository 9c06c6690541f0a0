"""Layer taps: the outputs of each layer as extra outputs of a part.

After its own outputs, a part with taps has ``hidden_states.<layer>`` (the layer's output),
``hidden_states.<layer>.attention`` and ``hidden_states.<layer>.mlp`` (the outputs of its attention
and its MLP, before they are added to the residual stream). Modules further inside
are tapped by kind (`INNER_TAPS`) or by a glob of their paths in the layer, and named by their
paths: ``hidden_states.<layer>.self_attn_q_proj``. Layers count from 0 in the order in which they
run. Two dumps of tapped parts can be compared layer by layer.

A plugin need not know of taps: the layers are the members of the list of modules that is as long as
the part's cache is deep, or else of the one with the most parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.arguments import texts
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.layers.layer_lists import LayerList, find_layer_list
from qeff_proxy.parts import INNER_TAPS, TAPS, Part, Proxy, TensorSpec, is_tap
from qeff_proxy.tensor_names import LAYER_NAME, PAST_INPUTS

#: Modules with their paths in a layer.
_Modules = list[tuple[str, nn.Module]]

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

#: Projections in attention, by the last name of their paths.
_FUSED = r"qkv|qkv_proj|c_attn|query_key_value|wqkv|w_pack|in_proj"
_IN_ATTENTION = {
    "q": re.compile(rf"(w?q|query)(_proj|_lin)?|q_[ab]_proj|{_FUSED}", re.IGNORECASE),
    "k": re.compile(rf"(w?k|key)(_proj|_lin)?|kv_.*|{_FUSED}", re.IGNORECASE),
    "v": re.compile(rf"(w?v|value)(_proj|_lin)?|kv_.*|{_FUSED}", re.IGNORECASE),
}
#: The same outside of attention. Where nothing has such a name, "up" is the first projection.
_IN_MLP = {
    "gate": re.compile(r"gate_proj|w1|wi_0|gate_up_proj"),
    "up": re.compile(r"up_proj|w3|wi_1|gate_up_proj"),
}
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


def normalize_taps(taps: str | Iterable[str] | None) -> tuple[str, ...]:
    """The taps asked for, each once; those with a name first, in the order of `TAPS`.

    Args:
        taps: Names and globs, or one string with commas between; ``None`` for none.

    Raises:
        UsageError: There is no such tap.
    """
    names = texts("taps", () if taps is None else taps)
    if isinstance(taps, str):
        names = taps.split(",")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if not is_tap(name):
            raise UsageError(
                f"there is no tap {name!r}",
                f"Known are {', '.join((*TAPS, *INNER_TAPS))}, and globs of the modules in a layer "
                "such as 'self_attn.*'.",
            )
    named = [name for name in (*TAPS, *INNER_TAPS) if name in names]
    return tuple(dict.fromkeys((*named, *names)))


def tap_proxy(proxy: Proxy, taps: Sequence[str]) -> Proxy:
    """A proxy whose parts also return the outputs of their layers.

    Parts without layers are not changed (the vocabulary's never are); a part with a cache must have
    layers, and so must at least one part. Kinds of projections that no part has, such as a gate in
    GPT-2, are left out and named in the setting ``absent_taps``.

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
    modules = [part.module for part in parts]
    places = [one for module in modules if isinstance(module, TappedPart) for one in module.places]
    absent = [tap for tap in taps if not any(tapped[tap] for _, tapped in places)]
    unknown = absent if len(absent) == len(taps) else [t for t in absent if t not in INNER_TAPS]
    if unknown:
        name = type(places[0][0]).__name__
        raise UnsupportedModelError(
            f"no {unknown[0]} can be found in the layers ({name})",
            "Tap the layers only: taps='layers'.",
        )
    noted = {"absent_taps": absent} if absent else {}
    return replace(proxy, parts=tuple(parts), settings={**proxy.settings, **noted})


def layers_of(part: Part) -> LayerList | None:
    """The layers of a part that taps are for; ``None`` where it has none."""
    if part.weights == "vocabulary":
        return None
    caches = (LAYER_NAME.match(spec.name) for spec in part.outputs)
    depth = len({match[2] for match in caches if match is not None and match[1] == "present"})
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
    _, outside = _projections(layer)
    return outside[-1][1] if outside else None


def _projections(layer: nn.Module) -> tuple[_Modules, _Modules]:
    """The projections in a layer's attention, and those outside of it, with their paths."""
    attention = _named(layer, _NAMES["attention"])
    inside = {id(one) for one in attention.modules()} if attention is not None else set()
    others = {
        id(inner)
        for path, one in layer.named_modules()
        if _OTHERS.search(_last(path))
        for inner in one.modules()
    }
    projections = [item for item in layer.named_modules() if _projects(item[1])]
    outside = [item for item in projections if id(item[1]) not in inside | others]
    return [item for item in projections if id(item[1]) in inside], outside


def _find_inner(layer: nn.Module, tap: str) -> _Modules:
    """The modules that an inner tap or a glob names, with their paths."""
    if tap not in INNER_TAPS:
        return [item for item in layer.named_modules() if item[0] and fnmatchcase(item[0], tap)]
    if tap == "norms":
        leaves = [item for item in layer.named_modules() if not list(item[1].children())]
        return [
            (p, m) for p, m in leaves if _NORM.search(_last(p)) or _NORM.search(type(m).__name__)
        ]
    attention, outside = _projections(layer)
    if tap in _IN_ATTENTION:
        return [item for item in attention if _IN_ATTENTION[tap].fullmatch(_last(item[0]))]
    if tap == "o":
        kinds = _IN_ATTENTION.values()
        return [item for item in attention if not any(k.fullmatch(_last(item[0])) for k in kinds)][
            -1:
        ]
    if tap == "down":
        return outside[-1:]
    found = [item for item in outside if _IN_MLP[tap].fullmatch(_last(item[0]))]
    return found or (outside[:1] if tap == "up" else [])


def _tapped_modules(layer: nn.Module, taps: Sequence[str]) -> dict[str, dict[str, nn.Module]]:
    """For each tap the modules whose outputs it adds, by the end of the output's name."""
    tapped: dict[str, dict[str, nn.Module]] = {}
    for tap in taps:
        if tap in TAPS:
            module = find_tapped(layer, tap)
            tapped[tap] = {} if module is None else {TAPS[tap]: module}
        else:
            modules = _find_inner(layer, tap)
            tapped[tap] = {f".{path.replace('.', '_')}": module for path, module in modules}
    return tapped


def _last(path: str) -> str:
    return path.rpartition(".")[2]


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
        self.places = tuple((layer, _tapped_modules(layer, taps)) for layer in layers)

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module; its own outputs come first, then the tapped ones, layer by layer."""
        past = tensors.get(f"past_key_values__0__{PAST_INPUTS}")
        seen = _Seen(None if past is None else past.shape[2])
        with seen.watching(self.places):
            outputs: Mapping[str, torch.Tensor] = self.module(**tensors)
        return {**outputs, **seen.tensors}


class _Seen:
    """The tapped outputs of one run of a part.

    Args:
        past: Positions before the new ones, where layers run over all of them: these are left out.
    """

    def __init__(self, past: int | None) -> None:
        self.past = past
        self.tensors: dict[str, torch.Tensor] = {}
        self.layer = -1

    @contextmanager
    def watching(
        self, places: Sequence[tuple[nn.Module, Mapping[str, Mapping[str, nn.Module]]]]
    ) -> Iterator[None]:
        """Note the outputs of tapped modules while the context is open."""
        handles = []
        try:
            for layer, tapped in places:
                handles.append(layer.register_forward_pre_hook(self._next_layer))
                # Several taps may name one module, such as that of a fused projection.
                named = {end: one for modules in tapped.values() for end, one in modules.items()}
                for end, module in named.items():
                    handles.append(module.register_forward_hook(self._noting(end)))
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
            if tensor is not None and tensor.is_floating_point():
                if self.past is not None and tensor.dim() > 2:
                    tensor = tensor[:, self.past :]
                # A copy, since the model may go on to change the tensor in place.
                self.tensors[f"hidden_states.{self.layer}{suffix}"] = tensor.clone()

        return note


def _tapped(part: Part, layers: Sequence[nn.Module], taps: Sequence[str]) -> Part:
    """The part with its taps; run once to learn their names and shapes."""
    from qeff_proxy.session.sample_inputs import TRACE_SIZES, sample_inputs

    module = TappedPart(part.module, layers, taps).eval()
    for tap in taps:
        if tap in TAPS and not any(tapped[tap] for _, tapped in module.places):
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
