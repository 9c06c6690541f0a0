"""Decoders with a cache of a class of their own, against their own runs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.export.export_model import export_model
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.families.own_cache import find_own_cache
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing import random_weights
from transformers import AutoModelForCausalLM, MiniMaxConfig, xLSTMConfig

CONFIGS = {
    # Keys and values in the layers of its cache, and states in a list beside them.
    "minimax": lambda: MiniMaxConfig(
        vocab_size=96,
        hidden_size=32,
        head_dim=8,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_local_experts=3,
        block_size=4,
        layer_types=["linear_attention", "full_attention"] * 2 + ["linear_attention"],
    ),
    # Three states of each layer, in a mapping of tuples.
    "xlstm": lambda: xLSTMConfig(
        vocab_size=96,
        hidden_size=128,
        embedding_dim=128,
        num_hidden_layers=5,
        num_blocks=5,
        num_heads=4,
    ),
}
EXPECTED = {
    "minimax": {"0.recurrent_state", "1.key", "1.value", "2.recurrent_state", "3.key", "3.value"}
    | {"4.recurrent_state"},
    "xlstm": {f"{layer}.recurrent_state{end}" for layer in range(5) for end in ("", "_1", "_2")},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_on_onnx_runtime_are_those_of_the_model(name: str, tmp_path: Any) -> None:
    config = CONFIGS[name]()
    model = random_weights(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    hooks = Plugins.discover().hooks_for(config.model_type)
    export = export_model(wrap_model(model), hooks, output=tmp_path / "export")
    prefix = "past_key_values."
    cached = {spec.name.removeprefix(prefix) for part in export.parts for spec in part.inputs}
    assert EXPECTED[name] <= cached
    ids = np.random.default_rng(0).integers(3, 96, (2, 8))
    actual, wanted = [], []
    cache: Any = None
    with open_sessions(compile_export(export)) as sessions:
        engine = CausalEngine(export.parts, sessions)
        assert engine.longest_step == 1
        for end in range(1, 9):
            seen = np.ones((2, end), np.int64)
            step = StepId("prefill", end)
            logits, cache = engine.step(step, ids[:, end - 1 : end], seen, cache)
            actual.append(logits)
    past: dict[str, Any] = {}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    for start, end in ((0, 6), (6, 7), (7, 8)):
        if takes_positions:  # MiniMax counts them by its first layer's keys, and that has none
            past["position_ids"] = torch.arange(start, end)[None].expand(2, -1)
        with torch.no_grad():
            outputs = model(torch.from_numpy(ids[:, start:end]), **past, use_cache=True)
        past[cache_argument(model.forward)] = cache_of(outputs)
        wanted.append(outputs.logits.numpy())
    expected = np.concatenate(wanted, 1)
    assert np.abs(np.concatenate(actual, 1) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - expected[:, :1]).max() > 1e-2 * np.abs(expected).max()


def test_a_cache_that_grows_along_another_axis_is_not_learnt() -> None:
    def run(rows: int, positions: int) -> Any:
        return SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(rows, positions, 2, 4))])

    assert find_own_cache(run) is None


def test_a_cache_that_keeps_something_for_some_lengths_only_is_not_learnt() -> None:
    """DeepSeek V4 compresses several positions to one."""

    def run(rows: int, positions: int) -> Any:
        return SimpleNamespace(blocks=[torch.zeros(rows, 4)] * (positions // 2))

    assert find_own_cache(run) is None


def test_what_has_no_row_for_each_of_the_batch_is_kept_as_it_is() -> None:
    def run(rows: int, positions: int) -> Any:
        return SimpleNamespace(seen=torch.tensor([0]), states={3: (torch.zeros(rows, 4),)})

    own = find_own_cache(run)
    assert own is not None
    assert [len(layer) for layer in own.layers] == [0, 0, 0, 1]
    state = torch.ones(2, 4)
    filled = own.filled({"past_key_values__3__recurrent_state": state}, "past_key_values")
    filled.seen += 1
    filled.states[3][0].add_(1)
    assert torch.equal(state, torch.ones(2, 4))
    assert own.template.seen.item() == 0
    assert torch.equal(own.tensors(filled)["3.recurrent_state"], state + 1)
