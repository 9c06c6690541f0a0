"""Build additive attention masks with NumPy, on the host."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from qeff_proxy.parts import MaskSpec


def build_mask(
    spec: MaskSpec,
    padding: npt.NDArray[np.integer[Any]],
    query_length: int,
    dtype: np.dtype[Any],
    blocks: npt.NDArray[np.integer[Any]] | None = None,
) -> npt.NDArray[Any]:
    """Build one additive mask.

    The rules are those of ``transformers.masking_utils``, with one addition: a query always sees
    itself, so that the softmax of a padded query row is defined.

    Args:
        spec: The mask's kind and size.
        padding: ``[batch, past + query]``, 1 for a token and 0 for padding.
        query_length: How many of the last positions are queries.
        dtype: The floating-point dtype of the mask.
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
            window = spec.kind == "bidirectional_window"
            before, after = ((spec.size - 1) // 2, spec.size // 2) if window else (spec.size,) * 2
            visible = visible & (queries - keys <= before) & (keys - queries <= after)
    else:
        visible = (keys <= queries)[None]
        if blocks is not None:
            query_blocks = blocks[:, total - query_length :, None]
            same_block = query_blocks == blocks[:, None, :]
            visible = visible | (same_block & (query_blocks >= 0))
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
    """The mask of a single query at the last position, as in each decode step."""
    visible = padding != 0
    if spec.size is not None and spec.kind.endswith("sliding"):
        reach = spec.size + spec.kind.startswith("bidirectional")
        visible[:, : max(0, visible.shape[1] - reach)] = False
    visible[:, -1] = True
    return np.where(visible, np.zeros((), dtype), _lowest(dtype))[:, None, None]


def hide_padding(padding: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The additive mask ``[batch, 1, 1, keys]`` of ``padding [batch, keys]``, for any query."""
    return np.where(padding != 0, np.zeros((), dtype), _lowest(dtype))[:, None, None]


def lengthen_mask(mask: npt.NDArray[Any], total: int) -> npt.NDArray[Any]:
    """Pad a mask ``[batch, 1, query, past + query]`` to ``total`` keys, the new ones hidden."""
    if mask.shape[-1] == total:
        return mask
    longer = np.full((*mask.shape[:-1], total), _lowest(mask.dtype), mask.dtype)
    longer[..., : mask.shape[-1]] = mask
    return longer


@functools.cache  # called at every step
def _lowest(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.finfo(dtype).min
    import ml_dtypes

    return ml_dtypes.finfo(dtype).min  # type: ignore[no-untyped-call]
