"""What counts as equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy.errors import CutError
from qeff_proxy.flows.equality import check_equal
from transformers import GPT2Config, GPT2Model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_barred_do_not_hide_a_difference(dtype):
    """Chameleon gives the lowest number for each token of an image."""
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).to(dtype)
    expected = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    expected[..., 0] = torch.finfo(dtype).min
    assert check_equal(model, {}, expected, expected.copy()).largest_value <= 1
    for place, value in (((0, 1, 2), 0.5), ((0, 1, 0), 0.0)):
        wrong = expected.copy()
        wrong[place] = value
        with pytest.raises(CutError, match="do not equal"):
            check_equal(model, {}, expected, wrong)
