"""Dynamic NTK: rotary frequencies that grow with the length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.testing import random_weights, tiny_config

LIMIT = 16
ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    config = tiny_config(
        "llama", max_position_embeddings=LIMIT, rope_parameters=ROPE, num_hidden_layers=5
    )
    random_weights(transformers.LlamaForCausalLM(config)).save_pretrained(folder / "checkpoint")
    return folder


def test_tokens_on_both_sides_of_the_limit_are_those_of_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is ``generate`` of transformers, each prompt on a model that ran no other."""
    monkeypatch.setenv("QEFF_HOME", str(folder / "home"))
    model = QEFFAutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    model.compile(prefill_seq_len=8)
    for length, new in ((40, 6), (5, 6), (10, 14)):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, 130, (1, length), generator=generator)
        uncut = transformers.LlamaForCausalLM.from_pretrained(folder / "checkpoint")
        expected = uncut.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
        result = model.generate(inputs={"input_ids": ids}, max_new_tokens=new)
        assert np.array_equal(result.generated_ids, expected[:, length:].numpy()), length
