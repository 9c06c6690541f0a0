"""The conformance suite on a vision-language model, and one that takes sounds."""

from __future__ import annotations

from typing import ClassVar

import torch
from qeff_proxy.testing import IMAGE_TEXT_TO_TEXT, Capabilities, FamilySuite, random_ids

IMAGE_TOKEN = 130
ROWS = 16  # image tokens of an image


class TestLlava(FamilySuite):
    model_type = "llava"
    auto_class = "AutoModelForImageTextToText"
    capabilities = IMAGE_TEXT_TO_TEXT
    sizes: ClassVar = {
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
            "projection_dim": 32,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 131,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        },
        "vision_feature_layer": [-1, -3],
        "image_token_id": IMAGE_TOKEN,
        "image_seq_length": ROWS,
    }

    def make_inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        image = torch.full((1, ROWS), IMAGE_TOKEN)
        rows = []
        for text in random_ids(IMAGE_TOKEN, (7, 5)):
            ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
            pixels = torch.randn(1, 3, 28, 28, generator=generator)
            rows.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            )
        return rows

    def other_input(self, row):
        return {**row, "pixel_values": row["pixel_values"].flip(-1)}


class TestQwen2Audio(FamilySuite):
    model_type = "qwen2_audio"
    task = "audio-text-to-text"
    auto_class = "AutoModelForSeq2SeqLM"
    capabilities = Capabilities(audio=True)
    sizes: ClassVar = {
        "audio_config": {
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
        },
        "text_config": {"model_type": "qwen2", **TestLlava.sizes["text_config"]},
        "audio_token_index": IMAGE_TOKEN,
    }

    def make_inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        rows = []
        for text, frames in zip(random_ids(IMAGE_TOKEN, (7, 5)), (64, 40), strict=True):
            sound = torch.full((1, frames // 4), IMAGE_TOKEN)
            ids = torch.cat([text[:, :2], sound, text[:, 2:]], dim=1)
            mask = (torch.arange(64) < frames)[None].to(torch.int64)
            features = torch.randn(1, 16, 64, generator=generator) * mask[:, None]
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "input_features": features,
                    "feature_attention_mask": mask,
                }
            )
        return rows

    def other_input(self, row):
        return {**row, "input_features": row["input_features"] * -1}
