"""What a folder holds besides plain weights is named, and never left out in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_files import checkpoint_identity
from qeff_proxy.load.load_model import load_model

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "acme/base"}


@pytest.fixture
def folder(saved_gpt2: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_gpt2, tmp_path / "checkpoint")


def test_an_adapter_without_weights_is_named(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_model(str(folder))


def test_the_base_model_of_an_adapter_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"acme/base"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json names no base model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, "quantized with hqq"),
        ({"bits": 4}, "quantized with an unknown method"),
    ],
)
def test_quantized_weights_of_a_method_that_is_not_known_are_refused(
    folder: Path, settings: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder))


def test_modules_in_folders_belong_to_the_identity(folder: Path) -> None:
    before = checkpoint_identity(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    with_module = checkpoint_identity(folder)
    assert with_module != before
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    assert checkpoint_identity(folder) not in {before, with_module}
