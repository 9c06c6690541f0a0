"""Voxtral Realtime, which hears a sound while it writes, against transformers' own generation."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UsageError
from qeff_proxy.request import Request
from qeff_proxy_vision import voxtral_realtime
from qeff_proxy_vision.tiny import with_random_weights
from transformers import (
    VoxtralRealtimeConfig,
    VoxtralRealtimeFeatureExtractor,
    VoxtralRealtimeForConditionalGeneration,
)

BINS, FRAMES, VOCABULARY = 16, 8, 99
LAYERS = {"num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 16}
#: Windows that hide something of 23 tokens, and of their 92 positions of the tower.
TEXT = {
    **LAYERS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 7,
}
AUDIO = {
    **LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_mel_bins": BINS,
    "sliding_window": 9,
}
SETTINGS = {"no_repeat_ngram_size": 2, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    config = VoxtralRealtimeConfig(
        text_config={"model_type": "voxtral_realtime_text", **TEXT},
        audio_config={"model_type": "voxtral_realtime_encoder", **AUDIO},
        default_num_delay_tokens=3,
    )
    torch.manual_seed(0)
    made = with_random_weights(VoxtralRealtimeForConditionalGeneration(config), 1.5)
    made.generation_config.update(eos_token_id=None, pad_token_id=0)
    return made.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("realtime")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def proxy(folder):
    made = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(folder, enable_proxy=True)
    made.export(folder / "export")
    return made


def inputs(tokens=23):
    """Two prompts, the second padded, and a sound of so many tokens for each."""
    generator = np.random.default_rng(2)
    ids = generator.integers(3, VOCABULARY, (2, 6))
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    sound = generator.standard_normal((2, BINS, tokens * FRAMES)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "input_features": sound}


def expected(model, given, **settings):
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that max_length is transformers' own; it is the sound's
        out = model.generate(
            **tensors, **SETTINGS, **settings, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, given["input_ids"].shape[1] :].numpy(), torch.stack(out.logits, 1)


def test_it_writes_until_the_sound_is_over(model, proxy, tmp_path):
    tokens, logits = expected(model, inputs())
    assert tokens.shape == (2, 17)
    assert len(np.unique(tokens)) > 8
    result = proxy.generate(inputs=inputs(), io_dir=tmp_path / "io", **SETTINGS)
    np.testing.assert_array_equal(result.generated_ids, tokens)
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(16))]
    actual = np.stack([dump.array(*step, "lm_head.out.logits")[:, -1] for step in steps], 1)
    assert np.abs(actual - logits.numpy()).max() < 1e-4 * logits.abs().max()
    features = dump.array("prefill", 0, "audio.out.audio_features")
    assert features.shape == (2, 23, 64)
    row = dump.array("decode", 2, "body.in.added_features")
    np.testing.assert_array_equal(row, features[:, 8:9])


def test_another_sound_gives_other_tokens(proxy):
    """Also in the steps behind the prompt: the sounds differ there alone."""
    given = inputs()
    first = proxy.generate(inputs=given, **SETTINGS).generated_ids
    given["input_features"][:, :, 10 * FRAMES :] *= -1
    other = proxy.generate(inputs=given, **SETTINGS).generated_ids
    assert np.array_equal(first[:, :4], other[:, :4])
    assert not np.array_equal(first, other)


def test_beams_and_fewer_tokens(model, proxy):
    for settings in ({"num_beams": 2, "max_new_tokens": 7}, {"max_new_tokens": 100}):
        tokens, _ = expected(model, inputs(), **settings)
        result = proxy.generate(inputs=inputs(), **SETTINGS, **settings)
        np.testing.assert_array_equal(result.generated_ids, tokens)


def test_one_graph_beside_the_tower(model, folder):
    whole = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder)
    parts = read_export(whole.export(folder / "whole")).parts
    assert [part.name for part in parts] == ["audio", "model"]
    result = whole.generate(inputs=inputs(), **SETTINGS)
    np.testing.assert_array_equal(result.generated_ids, expected(model, inputs())[0])


def test_its_layers_are_streamed(proxy, folder):
    cut = read_export(folder / "export").cut
    assert cut["weights"].startswith("streamed from the checkpoint; BLAKE3")
    assert cut["sites"]["embedding"]["module"] == "model.language_model.embed_tokens"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_features": None}, "input_features is missing, for 2 prompts"),
        ({"input_features": inputs()["input_features"][:1]}, "Give .*one for each prompt"),
        ({"input_features": inputs()["input_features"][..., :-3]}, "181 frames is not one of who"),
        ({"input_features": inputs(6)["input_features"]}, "has 6 tokens, and the sound 6"),
        ({"num_delay_tokens": np.array(5)}, "num_delay_tokens is 5, and the export has 3"),
        ({"input_values": np.ones((2, 9))}, "nothing uses the input 'input_values'"),
    ],
)
def test_what_cannot_be_right_is_refused(proxy, change, message):
    with pytest.raises(UsageError, match=message):
        proxy.generate(inputs={**inputs(), **change}, **SETTINGS)


class _Processor:
    """As the checkpoint's, which needs mistral-common: its extractor, and a prompt of its own."""

    def __init__(self):
        self.feature_extractor = VoxtralRealtimeFeatureExtractor(feature_size=BINS)

    def __call__(self, audio, sampling_rate, return_tensors):
        made = self.feature_extractor(
            audio, sampling_rate=sampling_rate, center=True, return_tensors=return_tensors
        )
        ids = torch.full((len(audio), 6), 7)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}


def test_sounds_are_given_to_the_processor():
    samples = np.random.default_rng(0).uniform(-1, 1, 160 * FRAMES * 20).astype(np.float32)
    tensors = voxtral_realtime.preprocess(_Processor(), Request(audio=(samples, samples)))
    assert tensors["input_features"].shape == (2, BINS, FRAMES * 20)
    with pytest.raises(UsageError, match="mistral-common"):
        voxtral_realtime.preprocess(object(), Request(audio=(samples,)))
