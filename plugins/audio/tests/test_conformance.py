"""The conformance suite on a recognizer with a CTC head, and on an encoder with a decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from qeff_proxy.testing import CTC, SPEECH_SEQ2SEQ, FamilySuite


class TestWav2Vec2(FamilySuite):
    model_type = "wav2vec2"
    auto_class = "AutoModelForCTC"
    capabilities = CTC
    sizes: ClassVar = {
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }

    def make_inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        return [
            {"input_values": torch.randn(1, samples, generator=generator)}
            for samples in (2_000, 1_300)
        ]


class TestWhisper(FamilySuite):
    model_type = "whisper"
    auto_class = "AutoModelForSpeechSeq2Seq"
    capabilities = SPEECH_SEQ2SEQ
    sizes: ClassVar = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "max_target_positions": 60,
        "decoder_start_token_id": 3,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }

    def make_model(self):
        model = super().make_model()
        model.generation_config.max_length = None
        return model

    def make_inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        return [{"input_features": torch.randn(1, 16, 100, generator=generator)} for _ in range(2)]
