"""Adapters of vision-language models, by the names of transformers 4 and of transformers 5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qeff_proxy.load.load_model import load_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
CONFIGS = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**SIZES),
        image_token_index=95,
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": ROPE},
        vision_config={"depth": 5, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        image_token_id=95,
    ),
}
#: What the names of the language model began with before transformers 4.52.
OLD = {"llava": "language_model.model.", "qwen2_vl": "model."}


@pytest.mark.parametrize("stored", ["old", "today"])
@pytest.mark.parametrize("named", ["old", "today"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_by_any_names_is_merged_as_peft_does(
    kind: str, named: str, stored: str, tmp_path: Path
) -> None:
    base, adapter = tmp_path / kind, tmp_path / "adapter"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind]()).eval()
    model.save_pretrained(base)
    if stored == "today":
        save_file(model.state_dict(), base / "model.safetensors", {"format": "pt"})
    config = LoraConfig(target_modules=["down_proj", "o_proj"], r=4)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    tuned.save_pretrained(adapter)
    if named == "old":
        file, prefix = adapter / "adapter_model.safetensors", "base_model.model."
        tensors = load_file(file).items()
        before, after = f"{prefix}model.language_model.", prefix + OLD[kind]
        save_file({name.replace(before, after): tensor for name, tensor in tensors}, file)
    oracle = dict(tuned.merge_and_unload().named_parameters())
    ours = dict(load_model(str(base), adapters=[adapter]).model.named_parameters())
    assert ours.keys() == oracle.keys()
    for name, weight in ours.items():
        assert (weight - oracle[name]).abs().max() <= 1e-6 * oracle[name].abs().max(), name
