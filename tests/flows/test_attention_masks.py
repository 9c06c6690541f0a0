"""Masks built by the host are those that transformers builds inside the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.flows.causal_engine import position_ids_of
from qeff_proxy.parts import MaskSpec
from transformers import DynamicCache, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function


def transformers_mask(function: str, padding: Any, query: int, **config: Any) -> Any:
    """The additive mask that transformers would build for this step."""
    total = padding.shape[1]
    cache = None
    if total > query:
        layer = DynamicLayer()
        states = torch.zeros(padding.shape[0], 1, total - query, 4)
        layer.update(states, states)
        cache = DynamicCache()
        cache.layers.append(layer)
    return getattr(masking_utils, function)(
        SimpleNamespace(_attn_implementation="eager", **config),
        torch.zeros(padding.shape[0], query, 8),
        torch.from_numpy(padding),
        cache,  # its name depends on the release of transformers
    ).numpy()


@pytest.mark.parametrize("query", [11, 4, 1])
@pytest.mark.parametrize(
    ("spec", "function", "config"),
    [
        (MaskSpec("m", "causal"), "create_causal_mask", {}),
        (
            MaskSpec("m", "sliding", 3),
            "create_sliding_window_causal_mask",
            {"sliding_window": 3},
        ),
        (
            MaskSpec("m", "chunked", 4),
            "create_chunked_causal_mask",
            {"attention_chunk_size": 4},
        ),
    ],
)
def test_causal_kinds(spec: MaskSpec, function: str, config: Any, query: int) -> None:
    padding = np.ones((3, 11), np.int64)
    padding[1, :2] = 0
    padding[2, :5] = 0
    expected = transformers_mask(function, padding, query, **config)
    actual = build_mask(spec, padding, query, np.dtype(np.float32))
    assert actual.shape == (3, 1, query, 11)
    real = padding[:, -query:].astype(bool)  # rows of padded queries mean nothing
    for row in range(3):
        assert np.array_equal(actual[row, 0][real[row]], expected[row, 0][real[row]])


@pytest.mark.parametrize(
    ("spec", "function", "config"),
    [
        (MaskSpec("m", "bidirectional"), "create_bidirectional_mask", {}),
        (
            MaskSpec("m", "bidirectional_sliding", 2),
            "create_bidirectional_sliding_window_mask",
            {"sliding_window": 2},
        ),
    ],
)
def test_bidirectional_kinds(spec: MaskSpec, function: str, config: Any) -> None:
    padding = np.ones((2, 7), np.int64)
    padding[1, 4:] = 0
    expected = transformers_mask(function, padding, 7, **config)
    actual = build_mask(spec, padding, 7, np.dtype(np.float32))
    real = padding.astype(bool)
    for row in range(2):
        assert np.array_equal(actual[row, 0][real[row]], expected[row, 0][real[row]])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_window_around_a_query_is_that_of_t5gemma2(size: int) -> None:
    padding = np.ones((2, 9), np.int64)
    padding[1, 6:] = 0
    expected = masking_utils.create_bidirectional_mask(
        SimpleNamespace(_attn_implementation="eager"),
        torch.zeros(2, 9, 8),
        torch.from_numpy(padding),
        and_mask_function=sliding_window_mask_function(size, is_causal=False),
    ).numpy()
    actual = build_mask(
        MaskSpec("m", "bidirectional_window", size), padding, 9, np.dtype(np.float32)
    )
    real = padding.astype(bool)
    for row in range(2):
        assert np.array_equal(actual[row, 0][real[row]], expected[row, 0][real[row]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_row_is_a_softmax_over_nothing(dtype: str) -> None:
    from qeff_proxy.arrays import numpy_dtype

    padding = np.zeros((1, 5), np.int64)
    mask = build_mask(MaskSpec("m", "causal"), padding, 5, numpy_dtype(dtype))
    assert mask.dtype == numpy_dtype(dtype)
    assert np.array_equal(mask[0, 0].astype(np.float32) == 0, np.eye(5, dtype=bool))
    assert np.isfinite(mask.astype(np.float32)).all()


def test_positions_are_counted_from_the_first_token() -> None:
    padding = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert position_ids_of(padding, 4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert position_ids_of(padding, 1).tolist() == [[3], [1]]
