"""``verify`` at a depth at which layers are streamed and repeated: five and more, unlike depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model

pytestmark = pytest.mark.one_home

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_TEXT = {"vocab_size": 131, "max_position_embeddings": 64, "pad_token_id": 0}


def llava(tower_layers: int, text_layers: int, feature_layer: Any = -2) -> Any:
    text = transformers.LlamaConfig(**_TEXT, num_hidden_layers=text_layers, **_SMALL)
    tower = transformers.CLIPVisionConfig(
        num_hidden_layers=tower_layers, image_size=28, patch_size=14, projection_dim=32, **_SMALL
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=tower,
            text_config=text,
            image_token_id=5,
            vision_feature_layer=feature_layer,
        )
    )


def encoder(kind: str, **sizes: Any) -> Any:
    config = transformers.CONFIG_MAPPING[kind](**{**_TEXT, "num_hidden_layers": 5, **sizes})
    return transformers.AutoModel.from_config(config)


MODELS: dict[str, Any] = {
    "distilbert": lambda: encoder("distilbert", dim=64, hidden_dim=96, n_heads=4, n_layers=5),
    "nomic_bert": lambda: encoder("nomic_bert", **_SMALL),
    "modernbert": lambda: encoder("modernbert", **_SMALL),
    "llava": lambda: llava(8, 5, [-2, -5]),
    "llama, tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_TEXT, num_hidden_layers=6, tie_word_embeddings=True, **_SMALL)
    ),
    "bert as a causal LM": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**_TEXT, num_hidden_layers=5, is_decoder=True, **_SMALL)
    ),
}
#: Layers of the model, its tower's or encoder's with them; the others have 5.
LAYERS = {"llava": 13, "llama, tied": 6}
#: The others are saved as float32.
BFLOAT16 = ("distilbert", "nomic_bert", "llama, tied")


def request_for(name: str) -> Request | None:
    """Input where the model has no processor that makes any."""
    generator = torch.Generator().manual_seed(0)
    if name == "llava":
        ids = torch.tensor([[1, 5, 5, 5, 5, 9, 11, 17]])
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
        return Request(inputs={"input_ids": ids, "pixel_values": pixels})
    return None


@pytest.mark.parametrize("name", MODELS)
def test_a_deep_checkpoint_passes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name in BFLOAT16 else torch.float32
    model = random_weights(MODELS[name]().eval(), 0).to(dtype)
    model.save_pretrained(tmp_path / "checkpoint")
    options = VerifyOptions(max_new_tokens=4)
    result = verify_model(str(tmp_path / "checkpoint"), request=request_for(name), options=options)
    (backend,) = result.results
    assert backend.error is None
    assert backend.comparison is not None
    assert backend.comparison.passed, backend.comparison
    taps = {t.name for t in backend.comparison.tensors if t.name.tensor == "hidden_states"}
    assert len(taps) == LAYERS.get(name, 5)
