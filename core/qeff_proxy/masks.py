"""Attention masks, built by the host and given to the graph.

transformers builds masks inside the model, from shapes and a cache, with operators that
accelerator compilers refuse. Here the host builds them, and while a part runs or is traced the
functions of ``transformers.masking_utils`` that the model calls return the host's.
"""

from __future__ import annotations

import functools
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import masking_utils

from qeff_proxy.parts import MaskKind, MaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    import numpy.typing as npt
    import torch
    from torch import nn

__all__ = ["MASK_NAMES", "build_mask", "lengthen_mask", "provide_masks", "record_masks"]

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


def build_mask(
    spec: MaskSpec,
    padding: npt.NDArray[np.integer[Any]],
    query_length: int,
    dtype: np.dtype[Any],
    blocks: npt.NDArray[np.integer[Any]] | None = None,
) -> npt.NDArray[Any]:
    """Build one additive mask.

    The rules are those of ``transformers.masking_utils``. One thing is added: a query may always
    see itself, so that a padded query row never becomes a softmax over nothing.

    Args:
        spec: The mask's kind and size.
        padding: ``[batch, past + query]``, 1 for a token and 0 for padding.
        query_length: How many of the last positions are queries.
        dtype: A floating dtype: the mask's.
        blocks: ``[batch, past + query]``: positions of the same block see each other, earlier or
            later (within the window, where there is one); -1 for positions of no block.

    Returns:
        ``[batch, 1, query, past + query]``: 0 where a query may see a key, the lowest finite
        number of ``dtype`` elsewhere.
    """
    total = padding.shape[1]
    if query_length == 1 and blocks is None and spec.kind != "chunked":
        return _mask_of_one(spec, padding, dtype)
    keys = np.arange(total)[None, :]
    queries = np.arange(total - query_length, total)[:, None]
    if spec.kind.startswith("bidirectional"):
        visible = np.ones((1, query_length, total), dtype=bool)
        if spec.size is not None:
            visible = visible & (np.abs(queries - keys) <= spec.size)
    else:
        visible = (keys <= queries)[None]
        if blocks is not None:
            own = blocks[:, total - query_length :, None]
            visible = visible | ((own == blocks[:, None, :]) & (own >= 0))
        if spec.kind == "sliding" and spec.size is not None:
            visible = visible & (keys > queries - spec.size)
    if spec.kind == "chunked" and spec.size is not None:
        left_padding = (np.cumsum(padding, axis=1) == 0).sum(axis=1)[:, None, None]
        same_chunk = (keys - left_padding) // spec.size == (queries - left_padding) // spec.size
        visible = visible & same_chunk
    visible = (visible & (padding[:, None, :] != 0)) | (keys == queries)
    lowest = _lowest(dtype)
    return np.where(visible, np.zeros((), dtype), lowest)[:, None]


def _mask_of_one(
    spec: MaskSpec, padding: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """The mask of the last position alone, which comes after all others: one for every token."""
    visible = padding != 0
    if spec.size is not None and spec.kind.endswith("sliding"):
        reach = spec.size + spec.kind.startswith("bidirectional")
        visible[:, : max(0, visible.shape[1] - reach)] = False
    visible[:, -1] = True
    return np.where(visible, np.zeros((), dtype), _lowest(dtype))[:, None, None]


def lengthen_mask(mask: npt.NDArray[Any], total: int) -> npt.NDArray[Any]:
    """A mask ``[batch, 1, query, past + query]`` with keys that nobody sees, up to ``total``."""
    if mask.shape[-1] == total:
        return mask
    longer = np.full((*mask.shape[:-1], total), _lowest(mask.dtype), mask.dtype)
    longer[..., : mask.shape[-1]] = mask
    return longer


@functools.cache  # asked for at every step
def _lowest(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.finfo(dtype).min
    import ml_dtypes

    return ml_dtypes.finfo(dtype).min  # type: ignore[no-untyped-call]


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
