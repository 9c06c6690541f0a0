"""Matrices at the edge of what codes are packed in."""

from __future__ import annotations

import pytest
import torch
from qeff_proxy.load.quantized.arithmetic import packed, scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_matrix_without_rows_has_no_numbers(bits: int, dtype: torch.dtype) -> None:
    codes, scales = torch.empty(0, bits, dtype=torch.int32), torch.empty(0, 1, dtype=dtype)
    blocks = [*scale(codes, scales, 32, dtype, 8, columns=32, read=packed(bits))]
    assert sum(block.numel() for block in blocks) == 0
    assert {block.dtype for block in blocks} <= {dtype}
