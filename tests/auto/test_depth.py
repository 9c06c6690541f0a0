"""A config that names fewer layers of a tower is obeyed, as transformers obeys it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.errors import CheckpointError, UsageError
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A LLaVA of 6 and 5 layers; each weight is another number."""
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=TOWER, text_config=TEXT, image_token_index=98)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return Path(folder)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, *[98] * 16, 5, 7]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
    return out.logits  # type: ignore[no-any-return]


def test_fewer_layers_of_the_tower_and_of_the_text(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = 3
    config.text_config.num_hidden_layers = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        face = QEFFAutoModelForImageTextToText.from_pretrained(folder, config=config)
        ours = face.model
    assert face.config.vision_config.num_hidden_layers == 3
    theirs = LlavaForConditionalGeneration.from_pretrained(
        folder, config=config, attn_implementation="eager"
    )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    whole = LlavaForConditionalGeneration.from_pretrained(folder)
    assert (logits(ours) - logits(whole)).abs().max() > 0.1


def test_a_tower_that_is_deeper_than_the_checkpoint_is_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = 7
    said = f"config says num_hidden_layers = 7, and the checkpoint {folder} has 6"
    with pytest.raises(UsageError, match=re.escape(said)):
        QEFFAutoModelForImageTextToText.from_pretrained(folder, config=config)


def test_another_weight_without_a_use_is_still_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = 3
    config.projector_hidden_act = "relu"
    config.multimodal_projector_bias = False
    face = QEFFAutoModelForImageTextToText.from_pretrained(folder, config=config)
    with pytest.raises(CheckpointError, match=r"multi_modal_projector.*bias, which"):
        face.model  # noqa: B018 (to read it is what raises)
