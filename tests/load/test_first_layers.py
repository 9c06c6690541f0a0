"""The first layers of a checkpoint are loaded; the others are known by names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy.load.first_layers import all_layers, enough_layers
from qeff_proxy.load.load_model import load_model


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])  # tied; experts fused on the way
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_first_layers_have_weights(
    model_type: str, dtype: str, make_model: Any, tmp_path: Path
) -> None:
    make_model(model_type, layers=5).save_pretrained(tmp_path, max_shard_size="200KB")
    whole = dict(load_model(str(tmp_path), dtype=dtype).model.named_parameters())
    loaded = load_model(str(tmp_path), dtype=dtype)
    assert loaded.sample is not None
    sampled = loaded.sample(enough_layers)
    assert (sampled.count, sampled.is_whole) == (2, False)
    absent = tuple(f"{sampled.layers.path}.{index}." for index in (2, 3, 4))
    parameters = dict(sampled.model.named_parameters())
    assert list(parameters) == list(whole)
    for name, parameter in parameters.items():
        assert parameter.is_meta == name.startswith(absent)
        assert (parameter.dtype, parameter.shape) == (whole[name].dtype, whole[name].shape)
        assert parameter.is_meta or torch.equal(parameter, whole[name])
    made = [name for name in parameters if sampled.sources.find(name) is None]
    assert bool(made) == (model_type == "mixtral")
    for weights in sampled.sources.make_layers(made):
        for name, weight in weights.items():
            assert torch.equal(weight, whole[name])
    assert all(p.is_meta == n.startswith(absent) for n, p in sampled.model.named_parameters())


def test_a_model_is_named_by_its_checkpoint(make_model: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.sample is not None
    sampled = loaded.sample(all_layers)
    assert sampled.is_whole
    assert sampled.model.name_or_path == str(tmp_path)
    assert sampled.model.generation_config.max_new_tokens == 7
