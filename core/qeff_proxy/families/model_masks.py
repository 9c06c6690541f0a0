"""Attention masks, built by the host and given to the graph.

transformers builds masks inside the model, from shapes and a cache, with operators that
accelerator compilers refuse. Here the host builds them, and while a part runs or is traced the
functions of ``transformers.masking_utils`` that the model calls return the host's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import masking_utils

from qeff_proxy.parts import MaskKind, MaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MASK_NAMES", "provide_masks", "record_masks"]

#: The graph input of each kind of mask; the commonest kind of a model has the plain name.
MASK_NAMES: dict[MaskKind, str] = {
    "causal": "attention_mask",
    "bidirectional": "attention_mask",
    "sliding": "sliding_attention_mask",
    "bidirectional_sliding": "sliding_attention_mask",
    "chunked": "chunked_attention_mask",
}


@dataclass(frozen=True)
class _Creator:
    function: str
    kind: MaskKind
    size_attribute: str | None = None


# What a model may call, and the config attribute that the function reads its size from.
_CREATORS = (
    _Creator("create_causal_mask", "causal"),
    _Creator("create_sliding_window_causal_mask", "sliding", "sliding_window"),
    _Creator("create_chunked_causal_mask", "chunked", "attention_chunk_size"),
    _Creator("create_bidirectional_mask", "bidirectional"),
    _Creator("create_bidirectional_sliding_window_mask", "bidirectional_sliding", "sliding_window"),
)


@contextmanager
def provide_masks(
    module: nn.Module, masks: Mapping[MaskKind, torch.Tensor | None]
) -> Iterator[None]:
    """Let ``module`` get the given masks from the functions it builds its masks with.

    A kind that is not in ``masks`` raises `LookupError` in the model, so a mask that nobody
    thought of is never missed in silence.
    """

    def make(creator: _Creator) -> Callable[..., Any]:
        def provided(*_args: Any, **_kwargs: Any) -> torch.Tensor | None:
            if creator.kind not in masks:
                raise LookupError(f"the model asks for a {creator.kind} mask that is not provided")
            return masks[creator.kind]

        return provided

    with _exchanged(module, make):
        yield


@contextmanager
def record_masks(module: nn.Module, into: dict[MaskKind, MaskSpec]) -> Iterator[None]:
    """Note in ``into`` which masks ``module`` asks for while the context is open."""

    def make(creator: _Creator) -> Callable[..., Any]:
        original = getattr(masking_utils, creator.function)

        def recording(*args: Any, **kwargs: Any) -> Any:
            config = args[0] if args else kwargs["config"]
            size = getattr(config, creator.size_attribute) if creator.size_attribute else None
            into[creator.kind] = MaskSpec(MASK_NAMES[creator.kind], creator.kind, size)
            return original(*args, **kwargs)

        return recording

    with _exchanged(module, make):
        yield


@contextmanager
def _exchanged(module: nn.Module, make: Callable[[_Creator], Callable[..., Any]]) -> Iterator[None]:
    """Exchange the mask functions in the modules of Python that define ``module``'s classes."""
    replacements = {
        id(getattr(masking_utils, creator.function)): make(creator) for creator in _CREATORS
    }
    changed: list[tuple[ModuleType, str, Any]] = []
    try:
        for name in {type(submodule).__module__ for submodule in module.modules()}:
            python_module = sys.modules[name]
            for attribute, value in list(vars(python_module).items()):
                if id(value) in replacements:
                    setattr(python_module, attribute, replacements[id(value)])
                    changed.append((python_module, attribute, value))
        yield
    finally:
        for python_module, attribute, value in changed:
            setattr(python_module, attribute, value)
