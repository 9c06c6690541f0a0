"""Dumps of a stack of layers, one of which can be made to err."""

from __future__ import annotations

import numpy as np
import pytest
from qeff_proxy.dump import DumpOptions, DumpWriter

LAYERS, HIDDEN = 5, 16


def write_stack(
    folder,
    *,
    wrong_layer=None,
    wrong_from=0,
    steps=4,
    dtype=np.float32,
    kv="delta",
    taps=True,
    fault=1e-2,
    model="stack",
):
    """Run ``LAYERS`` random linear layers with a cache; the weights of ``wrong_layer`` are off."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((LAYERS, HIDDEN, HIDDEN)).astype(np.float64) / 4
    prompts = rng.standard_normal((steps + 3, HIDDEN))
    cache = [np.zeros((1, 2, 0, HIDDEN // 2), dtype) for _ in range(LAYERS)]
    with DumpWriter(folder, {"model": model, "backend": "numpy"}, DumpOptions(kv=kv)) as writer:
        past = 0
        for number in range(steps + 1):
            query = 3 if number == 0 else 1
            x = prompts[past : past + query][None]
            inputs = {"inputs_embeds": x.astype(dtype)}
            outputs = {}
            for n in range(LAYERS):
                rows = x.reshape(1, query, 2, -1).swapaxes(1, 2).astype(dtype)
                inputs[f"past_key_values.{n}.key"] = cache[n]
                cache[n] = outputs[f"present.{n}.key"] = np.concatenate([cache[n], rows], axis=2)
                weight = weights[n].copy()
                if n == wrong_layer and number >= wrong_from:
                    weight[3, 5] += fault
                x = np.tanh(x @ weight) + x
                if taps:
                    outputs[f"hidden_states.{n}"] = x.astype(dtype)
            outputs["last_hidden_state"] = x.astype(dtype)
            phase, index = ("prefill", 0) if number == 0 else ("decode", number - 1)
            writer.step(phase, index, "body", inputs, outputs)
            past += query
    return folder


@pytest.fixture
def stack():
    return write_stack


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    return write_stack(tmp_path_factory.mktemp("stacks") / "good")


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    return write_stack(tmp_path_factory.mktemp("stacks") / "bad", wrong_layer=2)
