"""Recognizers at the sizes of whisper-tiny and wav2vec2-base, random weights, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.compare import compare_dumps
from qeff_proxy.dump import read_dump
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

TOKENS = 32
SECONDS = (0.4, 1.1, 2.3)


@pytest.fixture
def whisper_tiny():
    # The config's defaults are whisper-tiny's.
    config = WhisperConfig(
        suppress_tokens=None, begin_suppress_tokens=None, decoder_start_token_id=50258
    )
    assert (config.d_model, config.encoder_layers, config.vocab_size) == (384, 4, 51865)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "decoder.embed_positions" in name:  # else the same token came again and again
                parameter.copy_(torch.randn_like(parameter))
            elif "embed_tokens" in name or "encoder_attn" in name:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model


def test_whisper_tiny_gives_the_greedy_tokens_of_transformers(whisper_tiny, tmp_path):
    proxy = QEFFAutoModelForSpeechSeq2Seq(whisper_tiny, proxy="split")
    proxy.export(tmp_path / "export")
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    result = proxy.generate(
        inputs={"input_features": features},
        generation_len=TOKENS,
        io_dir=tmp_path / "a",
        io_steps="0:3",
    )
    with torch.no_grad():
        expected = whisper_tiny.generate(features, max_new_tokens=TOKENS, do_sample=False).numpy()
        ids = torch.from_numpy(expected)
        heard, deaf = (
            whisper_tiny(input_features=one, decoder_input_ids=ids).logits
            for one in (features, features * 0)
        )
    assert len(np.unique(expected)) > TOKENS // 2, "not one token over and over"
    assert (heard - deaf).abs().max() > 0.05, "it must listen for this to mean anything"
    np.testing.assert_array_equal(result.generated_ids, expected[:, -TOKENS:])

    names = [str(name) for name in read_dump(result.io_folder).names()]
    for tensor in ("encoder.out.cross_key_values_key", "body.out.present_value"):
        layers = {name.rpartition("layer-")[2] for name in names if name.startswith(tensor)}
        assert layers == {"00", "01", "02", "03"}
    other = proxy.generate(
        inputs={"input_features": features * 1.01},
        generation_len=3,
        io_dir=tmp_path / "b",
        io_steps="0:3",
    )
    assert compare_dumps(result.io_folder, result.io_folder).passed
    comparison = compare_dumps(result.io_folder, other.io_folder)
    assert not comparison.passed
    assert comparison.first_divergence.tensor == "encoder.in.input_features"


def test_wav2vec2_base_gives_the_logits_of_pytorch_at_three_lengths(tmp_path):
    config = Wav2Vec2Config()  # its defaults are wav2vec2-base's
    assert (config.hidden_size, config.num_hidden_layers, len(config.conv_dim)) == (768, 12, 7)
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.startswith("lm_head"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # Without what all frames have in common, which token is best hangs on the frame.
        model.lm_head.bias -= model(noise(0.5, seed=9)).logits.mean(dim=(0, 1))
    proxy = QEFFAutoModelForCTC(model, proxy="split")
    proxy.export(tmp_path / "export")
    for seed, seconds in enumerate(SECONDS):
        values = noise(seconds, seed)
        result = proxy.generate(inputs={"input_values": values})
        with torch.no_grad():
            expected = model(values).logits[0].numpy()
        np.testing.assert_allclose(result.logits[0], expected, atol=1e-4)
        np.testing.assert_array_equal(result.predicted_ids[0], expected.argmax(-1))
        assert len(np.unique(expected.argmax(-1))) > 3


def noise(seconds, seed):
    """Noise whose colour and loudness change."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(1, int(16_000 * seconds), generator=generator)
    time = torch.arange(samples.shape[1]) / 16_000
    return samples * (0.1 + torch.sin(9 * time) ** 2) + torch.sin(3000 * time**2)
