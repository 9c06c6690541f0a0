"""Rotary frequencies that change with the length: dynamic NTK and LongRoPE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import ExportError
from qeff_proxy.export.check_graph import check_graph
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
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


def test_a_graph_is_checked_behind_the_position_where_rotary_factors_change() -> None:
    """A graph whose limit is another one than the model's equals it at short lengths only."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0 + i for i in range(4)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.0, "factor": 4.0}
    rope |= {**factors, "original_max_position_embeddings": 4096}
    config = tiny_config("llama", max_position_embeddings=9000, rope_parameters=rope)
    loaded = wrap_model(random_weights(transformers.LlamaForCausalLM(config)))
    hooks = Plugins.discover().hooks_for("llama")
    export = export_model(loaded, hooks)
    part = cut_model(loaded, hooks, "split").proxy.part("body")
    path = export.folder / "body.onnx"
    assert check_graph(part, export.part("body").inputs, path) is not None
    loaded.model.config.rope_parameters["original_max_position_embeddings"] = 4000
    with pytest.raises(ExportError, match="differs by"):
        check_graph(part, export.part("body").inputs, path)
