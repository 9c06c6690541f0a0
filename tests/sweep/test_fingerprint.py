"""Fingerprints: small, and as far apart as the tensors that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qeff_proxy.dump import DumpWriter
from qeff_proxy.sweep.fingerprint import distance, find_dead_output, take_fingerprint


def dump_of(folder: Path, layers: list[np.ndarray]) -> Path:
    """One step of a body with these outputs of its layers."""
    with DumpWriter(folder, {"model": "m"}) as writer:
        outputs = {f"hidden_states.{n}": values for n, values in enumerate(layers)}
        outputs["last_hidden_state"] = layers[-1] * np.float32(0.5)
        writer.step("prefill", 0, "body", {"inputs_embeds": layers[0]}, outputs)
    return folder


@pytest.fixture
def layers() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, 8, 64)).astype(np.float32) for _ in range(80)]


def test_it_is_a_few_kilobytes_and_tells_where_values_moved(
    tmp_path: Path, layers: list[np.ndarray]
) -> None:
    one = take_fingerprint(dump_of(tmp_path / "one", layers))
    assert len(json.dumps(one)) < 6000
    assert len(one) <= 48
    noise = np.random.default_rng(1).standard_normal(layers[0].shape).astype(np.float32)
    moved = [*layers[:40], *(values + 0.1 * noise for values in layers[40:])]
    other = take_fingerprint(dump_of(tmp_path / "other", moved))
    apart = {tensor: distance(one, other, tensor) for tensor in one if ".layer-" in tensor}
    assert [far for tensor, far in apart.items() if tensor < "body.out.hidden_states.layer-40"] == [
        0.0
    ] * 20
    far = [each for tensor, each in apart.items() if tensor >= "body.out.hidden_states.layer-40"]
    assert 0.05 < float(np.median(far)) < 0.2  # it is 0.1
    assert distance(one, {}, "body.out.hidden_states.layer-00") is None


@pytest.mark.parametrize("value", [0.0, 3.5, np.nan])
def test_an_output_that_says_nothing_is_named(
    tmp_path: Path, layers: list[np.ndarray], value: float
) -> None:
    assert find_dead_output(dump_of(tmp_path / "live", layers)) is None
    layers[3] = np.full_like(layers[3], value)
    folder = dump_of(tmp_path / "dead", layers)
    assert find_dead_output(folder) == "body.out.hidden_states.layer-03"
    assert json.dumps(take_fingerprint(folder), allow_nan=False)
