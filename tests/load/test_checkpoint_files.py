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


def test_an_adapter_beside_the_base_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(CheckpointError, match=r"holds an adapter \(LORA\)") as caught:
        load_model(str(folder))
    assert "Merge it into acme/base" in str(caught.value)


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(CheckpointError, match=r"holds an adapter \(LORA\)"):
        load_model(str(tmp_path))


def test_a_folder_of_gguf_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds a GGUF file \(model-q4.gguf\)"):
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
