"""A capsule of a fault in each modality shows the fault with numpy and onnxruntime alone."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.export.export_model import export_model
from qeff_proxy.isolate import isolate_between
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.options import VerifyOptions
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

pytestmark = pytest.mark.one_home

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
IDS = np.arange(3, 12)[None] * 7 % 97


def bert() -> tuple[PreTrainedModel, Request]:
    config = BertConfig(**SIZES, vocab_size=131, num_hidden_layers=5, max_position_embeddings=64)
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    return BertModel(config), Request(inputs=inputs)


def whisper() -> tuple[PreTrainedModel, Request]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"encoder_layers": 5, "decoder_layers": 6, "d_model": 64, "num_mel_bins": 16}
    wide = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 40}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(**ids, **sizes, **wide, **heads, vocab_size=131)
    sound = np.random.default_rng(0).normal(size=(1, 16, 80)).astype(np.float32)
    return WhisperForConditionalGeneration(config), Request(inputs={"input_features": sound})


def llava() -> tuple[PreTrainedModel, Request]:
    text = LlamaConfig(**SIZES, vocab_size=131, num_hidden_layers=6, max_position_embeddings=128)
    tower = CLIPVisionConfig(**SIZES, num_hidden_layers=5, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=130)
    ids = np.concatenate([[[5, 6]], np.full((1, 4), 130), [[7, 8, 9]]], axis=1)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    return LlavaForConditionalGeneration(config), Request(inputs=inputs)


def llama() -> tuple[PreTrainedModel, Request]:
    config = LlamaConfig(**SIZES, vocab_size=131, num_hidden_layers=6, max_position_embeddings=128)
    return LlamaForCausalLM(config), Request(inputs={"input_ids": IDS})


FAULTS = {
    "text": (llama, "llama", "body", "body layer 4", "layers.4.mlp.gate_proj.weight"),
    "embedding": (bert, "bert", "body", "body layer 2", "2.intermediate.dense.weight"),
    "audio": (whisper, "whisper", "encoder", "encoder layer 3", "encoder.layers.3.fc1.weight"),
    "vision": (llava, "llava", "vision", "vision layer 1", "layers.1.mlp.fc1.weight"),
}


def halve(folder: Path, part: str, ending: str) -> str:
    """Flip the lowest bit of the exponents of a row of a weight: all are twice or half as large."""
    name = read_export(folder).part(part).weights
    assert name is not None
    file = folder / name
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    (weight,) = (
        (one for one in header if one.endswith(ending) and "vision" in one)
        if (part == "vision")
        else (one for one in header if one.endswith(ending))
    )
    begin, _ = header[weight]["data_offsets"]
    for element in range(header[weight]["shape"][-1]):
        data[8 + size + begin + 4 * element + 2] ^= 1 << 7
    file.write_bytes(data)
    return weight


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> list[str]:
    """Python with NumPy and ONNX Runtime alone, as in an environment that has nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("numpy", "onnxruntime"):
        place = Path(importlib.import_module(name).__file__).parent
        for one in place.parent.glob(f"{name}*"):  # with the libraries that its wheel brings
            if one.name in (name, f"{name}.libs"):
                (folder / one.name).symlink_to(one)
    start = f"import runpy, sys; sys.path.insert(0, {str(folder)!r}); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", start]
    code = f"{start.rpartition('; ')[0]}; import onnxruntime, importlib.util as u; " + (
        "print([n for n in ('onnx', 'torch', 'qeff_proxy', 'pytest') if u.find_spec(n)])"
    )
    said = subprocess.run([*command[:-1], code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
    return command


@pytest.mark.parametrize("modality", FAULTS)
def test_a_wrong_weight_of_each_modality(modality, tmp_path, clean):
    make, family, part, where, ending = FAULTS[modality]
    model, request = make()
    hooks = Plugins.discover().hooks_for(family)
    loaded = wrap_model(random_weights(model.eval(), 0))
    first = export_model(loaded, hooks, output=tmp_path / "first", taps="layers").folder
    second = Path(shutil.copytree(first, tmp_path / "second"))
    options = VerifyOptions(max_new_tokens=1)
    pair = read_export(first), read_export(second)
    assert isolate_between(*pair, request, options).healthy
    weight = halve(second, part, ending)
    path = tmp_path / "fault.zip"
    fault = isolate_between(*pair, request, options, capsule=path)
    assert fault.where == where
    (cause,) = fault.causes
    assert any(weight in operator.weights for operator in cause.operators)
    assert cause.remaining == 0 < cause.error
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "lab")
    script = str(tmp_path / "lab" / "run.py")
    done = subprocess.run([*clean, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    shares = [float(line.split()[-1].strip("%")) for line in done.stdout.splitlines()[1:3]]
    assert shares[1] == pytest.approx(shares[0], rel=0.01)
    assert shares[0] > 0.1
    assert "The fault shows here." in done.stdout
