"""Attention masks that the host builds and the graph takes as inputs.

transformers builds masks inside the model, from shapes and a cache, with operators that
accelerator compilers refuse. Here the host builds them. While a part runs or is traced, the
functions of ``transformers.masking_utils`` that its model calls return the host's masks. They do so
in the context (`contextvars`) that asked for it only: a model of the same class in another thread
builds its own masks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, wraps
from inspect import unwrap
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from transformers import masking_utils

from qeff_proxy.common.shared_change import SharedChanges
from qeff_proxy.parts import MaskKind, MaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Name of the graph input of each kind of mask; a model's most frequent kind has the plain name.
MASK_NAMES: dict[MaskKind, str] = {
    "causal": "attention_mask",
    "bidirectional": "attention_mask",
    "sliding": "sliding_attention_mask",
    "bidirectional_sliding": "sliding_attention_mask",
    "bidirectional_window": "sliding_attention_mask",
    "chunked": "chunked_attention_mask",
}


@dataclass(frozen=True)
class _Creator:
    function: str
    kind: MaskKind
    size_attribute: str | None = None


# The functions that a model may call, and the config attribute that holds a window's size.
_CREATORS = (
    _Creator("create_causal_mask", "causal"),
    _Creator("create_sliding_window_causal_mask", "sliding", "sliding_window"),
    _Creator("create_chunked_causal_mask", "chunked", "attention_chunk_size"),
    _Creator("create_bidirectional_mask", "bidirectional"),
    _Creator("create_bidirectional_sliding_window_mask", "bidirectional_sliding", "sliding_window"),
)


_FAR = 1 << 15  # positions, more than a window has

#: Gives recurrent layers the padding of the queries; it assumes that a single one is none.
_PADDING = _Creator("create_recurrent_attention_mask", "causal")


@contextmanager
def provide_masks(
    module: nn.Module, masks: Mapping[MaskKind, torch.Tensor | None]
) -> Iterator[None]:
    """Let the functions that ``module`` builds its masks with return the host's masks.

    Where the host has none, since nothing is padded, a function of the model's own that limits what
    each query sees is calculated in the graph.
    A kind that is not in ``masks`` raises `LookupError` in the model, so that no mask is left out
    in silence. Recurrent layers get the padding of the queries, of a single one too.
    """

    def make(creator: _Creator) -> Callable[..., Any]:
        if creator is _PADDING:
            return _padding_of_queries

        def provided(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            kind = _spec_of(creator, args, kwargs).kind
            if kind not in masks:
                raise LookupError(f"the model asks for a {kind} mask that is not provided")
            sees = kwargs.get("and_mask_function")
            if masks[kind] is None and kind == "bidirectional" and sees is not None:
                return _mask_of(sees, kwargs["inputs_embeds"])
            return masks[kind]

        return provided

    with _replaced(module, make):
        yield


@contextmanager
def record_masks(module: nn.Module, into: dict[MaskKind, MaskSpec]) -> Iterator[None]:
    """Record in ``into`` which masks ``module`` builds while the context is open."""

    def make(creator: _Creator) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(masking_utils, creator.function)
        if creator is _PADDING:
            return original

        def recording(*args: Any, **kwargs: Any) -> Any:
            spec = _spec_of(creator, args, kwargs)
            taken = {other.name for kind, other in into.items() if kind != spec.kind}
            if spec.name in taken:  # a decoder's mask over an encoder's output, beside its own
                spec = replace(spec, name=f"{spec.kind}_{spec.name}")
            into[spec.kind] = spec
            return original(*args, **kwargs)

        return recording

    with _replaced(module, make):
        yield


def _mask_of(sees: Callable[..., torch.Tensor], of: torch.Tensor) -> torch.Tensor:
    """``[1, 1, query, key]``: 0 for the keys that a query sees, the least number for others."""
    import torch

    positions = torch.arange(of.shape[1], device=of.device)
    seen = sees(0, 0, positions[:, None], positions[None, :])
    return torch.where(seen, 0.0, torch.finfo(of.dtype).min).to(of.dtype)[None, None]


def _padding_of_queries(
    config: Any,  # noqa: ARG001 (as the model calls it)
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> torch.Tensor | None:
    """``[batch, query]``: 1 for a token and 0 for padding."""
    return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]


def _spec_of(creator: _Creator, args: Any, kwargs: Any) -> MaskSpec:
    """The mask that a model asks for by calling a function with these arguments."""
    config = args[0] if args else kwargs["config"]
    kind = creator.kind
    size = getattr(config, creator.size_attribute) if creator.size_attribute else None
    everything = getattr(config, "use_bidirectional_attention", False) is True
    if everything and kwargs.get("or_mask_function") is not None:
        # Later keys are added to the earlier ones; the distance is less than the window's size.
        kind = "bidirectional" if kind == "causal" else "bidirectional_sliding"
        size = size - 1 if size else None
    if kind == "bidirectional" and (window := _window_of(kwargs.get("and_mask_function"))):
        kind, size = "bidirectional_window", window
    return MaskSpec(MASK_NAMES[kind], kind, size)


def _window_of(sees: Callable[..., Any] | None) -> int | None:
    """The number of keys that a query sees by a model's own function, as many after it as before.

    Of an even number, one more is after it. ``None`` for any other function.
    """
    try:
        if sees is None or sees(0, 0, 0, 0) is not True:  # some give tensors
            return None
    except Exception:  # noqa: BLE001 (and some take nothing else)
        return None
    reach = partial(sees, 0, 0, _FAR)
    after = next((n for n in range(_FAR) if not reach(_FAR + n + 1)), _FAR)
    before = next((n for n in range(_FAR) if not reach(_FAR - n - 1)), _FAR)
    return before + after + 1 if after - before in (0, 1) and after < _FAR else None


#: In this context: what replaces a mask function, by the Python module that calls it and its name.
_REPLACED: ContextVar[Mapping[tuple[str, str], Callable[..., Any]]] = ContextVar("replaced")
_WRAPPED = SharedChanges()


@contextmanager
def _replaced(module: nn.Module, make: Callable[[_Creator], Callable[..., Any]]) -> Iterator[None]:
    """Replace the mask functions, in this context, where ``module``'s classes are defined."""
    creators = {
        unwrap(getattr(masking_utils, creator.function)): creator
        for creator in (*_CREATORS, _PADDING)
    }
    replaced = dict(_REPLACED.get({}))
    with ExitStack() as stack:
        for name in {type(submodule).__module__ for submodule in module.modules()}:
            python_module = sys.modules[name]
            for attribute, value in list(vars(python_module).items()):
                creator = creators.get(unwrap(value)) if isinstance(value, FunctionType) else None
                if creator is not None:
                    wrap = partial(_wrap, python_module, attribute)
                    stack.enter_context(_WRAPPED.needed((name, attribute), wrap))
                    replaced[name, attribute] = make(creator)
        token = _REPLACED.set(replaced)
        stack.callback(_REPLACED.reset, token)
        yield


def _wrap(python_module: ModuleType, attribute: str) -> Callable[[], object]:
    """Let a Python module's mask function look for a replacement in the context of its caller."""
    original = getattr(python_module, attribute)
    key = (python_module.__name__, attribute)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _REPLACED.get({}).get(key, original)(*args, **kwargs)

    setattr(python_module, attribute, wrapper)
    return partial(setattr, python_module, attribute, original)
