"""Of several files with weights, the one that transformers takes is read; the others are named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.first_layers import all_layers
from qeff_proxy.load.load_model import load_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def other(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a model with other weights than `saved_gpt2` has."""
    folder = tmp_path_factory.mktemp("other")
    make_model("gpt2", seed=9).save_pretrained(folder, max_shard_size="100KB")
    return folder


def copy_shards(folder: Path, other: Path) -> None:
    for path in other.glob("model*"):
        shutil.copy(path, folder)


def only_shards(folder: Path, other: Path) -> None:
    copy_shards(folder, other)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def stale_index(folder: Path, other: Path) -> None:
    shutil.copy(other / INDEX, folder)


def variant(folder: Path, other: Path) -> None:
    del other
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() + 1 for name, tensor in tensors.items()}
    save_file(halves, folder / "model.fp16.safetensors")


def original(folder: Path, other: Path) -> None:
    (folder / "original").mkdir()
    shutil.copy(next(other.glob("*.safetensors")), folder / "original" / "consolidated.safetensors")


def named(folder: Path, other: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shifted = {name: tensor + 0.5 for name, tensor in tensors.items()}
    save_file(shifted, folder / "best.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "best.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (copy_shards, r"from model\.safetensors, .*model-00001-of-.*index\.json left aside"),
        (only_shards, r"from model-0.* and \d more, .*; consolidated\.safetensors left aside"),
        (stale_index, r"model\.safetensors, .*; model\.safetensors\.index\.json left aside"),
        (variant, r"from model\.safetensors, .*; model\.fp16\.safetensors left aside"),
        (original, r"from model\.safetensors, .*; original/ left aside"),
        (named, r"from best\.safetensors, .*; model\.safetensors left aside"),
    ],
)
def test_the_files_that_transformers_takes_are_read(
    change: Callable[[Path, Path], None], said: str, saved_gpt2: Path, other: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_gpt2, tmp_path / "checkpoint"))
    change(folder, other)
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    with pytest.warns(UserWarning, match=said):
        loaded = load_model(str(folder))
    assert loaded.sample is not None
    for model in (loaded.model, loaded.sample(all_layers).model):
        for name, weight in model.named_parameters():
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    "name",
    ["model.fp16.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"],
)
def test_weights_that_transformers_does_not_find_are_named(
    name: str, saved_gpt2: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_gpt2, tmp_path / "checkpoint"))
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    with pytest.raises(CheckpointError, match=f"transformers does not read {re.escape(name)}"):
        load_model(str(folder))


def test_a_config_that_names_no_weights_is_refused(saved_gpt2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_gpt2, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("gone.safetensors", "../checkpoint/model.safetensors", "config.json"):
        text = json.dumps({**config, "transformers_weights": name})
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="which is no safetensors file or index"):
            load_model(str(folder))
