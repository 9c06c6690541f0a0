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
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from qeff_proxy.testing import random_weights
from qeff_proxy.verify.by_layer import verify_layers
from qeff_proxy.verify.options import VerifyOptions
from transformers import AutoModelForCausalLM, MiniMaxConfig, RecurrentGemmaConfig, xLSTMConfig

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


def test_states_in_modules_are_named_and_padding_stays_out_of_them(tmp_path: Any) -> None:
    config = RecurrentGemmaConfig(
        vocab_size=96,
        hidden_size=32,
        lru_width=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=64,
        attention_window_size=4,
    )
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    random_weights(made).save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"))
    hooks = Plugins.discover().hooks_for(config.model_type)
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    body = export.part("body")
    shapes = {spec.name: spec.shape for spec in body.inputs}
    assert shapes["inputs_embeds"] == ("batch", 1, 32)
    assert shapes["past_key_values.4.conv_state"] == ("batch", 32, 3)
    assert shapes["past_key_values.4.recurrent_state"] == ("batch", 32)
    assert shapes["past_key_values.2.key"] == ("batch", 1, "past", 8)
    model = made.eval()
    assert not any(torch.is_tensor(x) for one in model.modules() for x in vars(one).values())
    ids = np.random.default_rng(0).integers(3, 96, (2, 9))
    padding = np.ones_like(ids)
    padding[1, :3] = 0
    prompts = [ids[0], ids[1, 3:]]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = [
        model.generate(torch.from_numpy(one)[None], **settings)[0, -6:].tolist() for one in prompts
    ]
    request = Request(inputs={"input_ids": ids, "attention_mask": padding})
    result = run_compiled(compile_export(export), hooks, request, settings=settings)
    assert result.outputs["generated_ids"].tolist() == expected
    assert len(set(expected[0] + expected[1])) > 2
    with torch.no_grad():
        whole = [model(torch.from_numpy(row)[None], use_cache=False).logits for row in prompts]
    with open_sessions(compile_export(export)) as sessions:
        engine, cache = CausalEngine(export.parts, sessions), None
        for end in range(1, 10):
            one, seen = ids[:, end - 1 : end], padding[:, :end]
            logits, cache = engine.step(StepId("prefill", end), one, seen, cache)
            for row, begin in ((0, 0), (1, 3)):
                if end > begin:
                    wanted = whole[row][0, end - 1 - begin].numpy()
                    assert np.abs(logits[row, 0] - wanted).max() < 1e-4 * np.abs(wanted).max()
    options = VerifyOptions(max_new_tokens=2, output=export.folder)
    found = verify_layers(str(tmp_path / "checkpoint"), request=request, options=options)
    assert found.passed, found.results
    # One graph: the modules with states are deeper in it.
    export_model(loaded, hooks, output=tmp_path / "stub", kind="stub")
    one = compile_export(export_model(loaded, hooks, output=tmp_path / "whole", kind="whole"))
    result = run_compiled(one, hooks, request, settings=settings)
    assert result.outputs["generated_ids"].tolist() == expected
