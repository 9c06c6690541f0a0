"""A small run of a decoder with a cache, and what it put through the writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.dump import DumpOptions, DumpWriter

LAYERS, HEADS, SIZE, HIDDEN = 2, 3, 4, 8


class Run:
    """A dump and every array that was handed to its writer, by (phase, index, part, side, name)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[tuple[str, int, str, str, str], np.ndarray] = {}


def run_model(folder: Path, *, decode: int = 4, chunks: int = 2, **options: Any) -> Run:
    run, rng = Run(folder), np.random.default_rng(0)
    cache = {
        f"{layer}.{kind}": np.zeros((1, HEADS, 0, SIZE), np.float32)
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }

    def call(writer, phase, index, part, inputs, outputs):
        for side, tensors in (("in", inputs), ("out", outputs)):
            for name, array in tensors.items():
                run.arrays[phase, index, part, side, name] = array.copy()
        writer.step(phase, index, part, inputs, outputs)

    with DumpWriter(folder, {"model": "tiny", "seed": 0}, DumpOptions(**options)) as writer:
        past = 0
        steps = [("prefill", i, 3) for i in range(chunks)] + [
            ("decode", i, 1) for i in range(decode)
        ]
        for phase, index, query in steps:
            embeds = rng.standard_normal((1, query, HIDDEN), dtype=np.float32)
            ids = rng.integers(0, 9, (1, query))
            call(writer, phase, index, "embedding", {"input_ids": ids}, {"inputs_embeds": embeds})
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, past + query), np.int64),
                **{f"past_key_values.{key}": value for key, value in cache.items()},
            }
            for key, value in cache.items():
                new = rng.standard_normal((1, HEADS, query, SIZE), dtype=np.float32)
                cache[key] = np.concatenate([value, new], axis=2)
            outputs = {"last_hidden_state": embeds * 2}
            outputs |= {f"present.{key}": value for key, value in cache.items()}
            outputs |= {f"hidden_states.{n}": embeds + n for n in range(LAYERS)}
            call(writer, phase, index, "body", inputs, outputs)
            past += query
    return run


@pytest.fixture
def make_run():
    return run_model


@pytest.fixture(scope="session")
def delta_run(tmp_path_factory):
    return run_model(tmp_path_factory.mktemp("runs") / "delta")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    return run_model(tmp_path_factory.mktemp("runs") / "full", kv="full")
