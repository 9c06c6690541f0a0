"""Small recognizers with random weights, norms and biases, and a home for what they export."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

CTC_SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
CTC_CONFIGS = {
    "wav2vec2": lambda: transformers.Wav2Vec2Config(**CTC_SIZES, **POSITIONS),
    "wav2vec2-layer": lambda: transformers.Wav2Vec2Config(
        **CTC_SIZES, **POSITIONS, feat_extract_norm="layer", do_stable_layer_norm=True
    ),
    "hubert": lambda: transformers.HubertConfig(**CTC_SIZES, **POSITIONS),
    "wavlm": lambda: transformers.WavLMConfig(**CTC_SIZES, **POSITIONS),
    "data2vec-audio": lambda: transformers.Data2VecAudioConfig(
        **CTC_SIZES, num_conv_pos_embeddings=2, conv_pos_kernel_size=5
    ),
}
WHISPER = {
    "vocab_size": 200,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

#: Tokens behind this one are timestamps, 20 ms apart; a window lasts a second.
NO_TIMESTAMPS = 148


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """One cache for all tests of a run, so that an export is made once."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="session")
def ctc_model():
    """A function that makes a CTC model of a family."""

    def make(family, **changes):
        torch.manual_seed(0)
        config = CTC_CONFIGS[family]()
        config.update(changes)
        model = transformers.AutoModelForCTC.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.startswith("lm_head"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def wav2vec2(ctc_model):
    return ctc_model("wav2vec2")


@pytest.fixture(scope="session")
def whisper():
    """A Whisper whose tokens differ from step to step, and hang on what it hears."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "decoder.embed_positions" in name:
                parameter.copy_(torch.randn_like(parameter) * 3)
            elif "embed_tokens" in name:
                parameter.mul_(20)
            elif "encoder_attn.q_proj" in name or "encoder_attn.k_proj" in name:
                parameter.mul_(60)
            elif "_proj.weight" in name:
                parameter.mul_(10 if "encoder_attn" in name else 8)
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model.eval()


@pytest.fixture
def telling_time(whisper, monkeypatch, tmp_path):
    """The same with timestamp tokens; a home of its own, since only its settings differ."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    model = copy.deepcopy(whisper)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=3,
        bos_token_id=1,
        pad_token_id=0,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
    )
    return model


@pytest.fixture
def features(whisper):
    """``[2, mel, frames]`` of noise."""
    config = whisper.config
    shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="session")
def processor(whisper):
    """Features of one second, and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet[:NO_TIMESTAMPS])}
    vocabulary["<|notimestamps|>"] = NO_TIMESTAMPS
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return transformers.WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)
