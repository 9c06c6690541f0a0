"""States, and all inputs so far, on a backend of fixed shapes: no padded position may count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.random_inputs import random_inputs
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from qeff_proxy.testing.tiny import random_weights, tiny_config
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

if TYPE_CHECKING:
    from qeff_proxy.backends.compile_export import Compiled

pytestmark = pytest.mark.one_home

IDS = np.array([[5, 60, 7, 80, 9, 100, 11], [0, 0, 0, 18, 47, 120, 33]])
MASK = (IDS > 0) * 1


@pytest.fixture(scope="module")
def case(tmp_path_factory: Any) -> tuple[Any, Compiled]:
    kinds = ["conv", "full_attention", "conv"]
    config = tiny_config("lfm2", layer_types=kinds, num_hidden_layers=3, full_attn_idxs=None)
    model = random_weights(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    hooks = Plugins.discover().hooks_for("lfm2")
    export = export_model(wrap_model(model), hooks, output=tmp_path_factory.mktemp("e") / "export")
    fixed = {"static_shapes": True}
    options = CompileOptions(ctx_len=16, prefill_seq_len=4, batch_size=2, backend=fixed)
    return model, compile_export(export, "openvino", options)


def test_a_prompt_that_is_no_multiple_of_the_chunk_has_the_tokens_of_the_model(case: Any) -> None:
    model, compiled = case
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    eager = model.generate(
        **{name: torch.from_numpy(array) for name, array in inputs.items()},
        max_new_tokens=6,
        do_sample=False,
    )
    hooks = Plugins.discover().hooks_for("lfm2")
    settings = {"max_new_tokens": 6, "do_sample": False}
    result = run_compiled(compiled, hooks, Request(inputs=inputs), settings=settings)
    assert np.array_equal(result.outputs["generated_ids"], eager[:, IDS.shape[1] :])


def test_positions_that_would_be_padded_are_refused(case: Any) -> None:
    _, compiled = case
    body = compiled.export.part("body")
    feeds = random_inputs(body, {"batch": 2, "query": 3, "past": 0}, np.random.default_rng(0))
    with (
        open_sessions(compiled) as sessions,
        pytest.raises(BackendError, match="3 positions of the body part would be padded to 4"),
    ):
        sessions["body"].run(feeds)


def test_a_model_without_a_cache_runs_over_all_inputs_of_fixed_shapes(tmp_path: Any) -> None:
    config = OpenAIGPTConfig(vocab_size=131, n_positions=64, n_embd=32, n_layer=5, n_head=4)
    model = random_weights(AutoModelForCausalLM.from_config(config))
    hooks = Plugins.discover().hooks_for("openai-gpt")
    export = export_model(wrap_model(model), hooks, output=tmp_path / "export")
    fixed = {"static_shapes": True}
    options = CompileOptions(ctx_len=16, prefill_seq_len=4, batch_size=2, backend=fixed)
    with open_sessions(compile_export(export, "openvino", options)) as sessions:
        engine, cache = CausalEngine(export.parts, sessions), None
        for index, (start, end) in enumerate([(0, 4), (4, 6), (6, 7)]):
            ids, seen = IDS[:, start:end], MASK[:, :end]
            logits, cache = engine.step(StepId("prefill", index), ids, seen, cache)
            for row, begin in ((0, 0), (1, 3)):
                with torch.no_grad():  # the row alone
                    alone = model(torch.from_numpy(IDS[row : row + 1, begin:end])).logits[0, -1]
                assert np.abs(logits[row, -1] - alone.numpy()).max() < 1e-4 * alone.abs().max()
