"""Whisper on ONNX Runtime, against transformers' own generation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import soundfile
import torch
from qeff_proxy import QEFFAutoModelForCausalLM, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compare import compare_dumps
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CutError, UnsupportedModelError, UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Site
from qeff_proxy_audio.speech_flow import SpeechFlow
from safetensors import safe_open
from transformers import WhisperForCausalLM, WhisperForConditionalGeneration


def reference(whisper, features, **settings):
    with torch.no_grad():
        return whisper.generate(features, **settings).numpy()


@pytest.fixture
def proxy(whisper):
    return QEFFAutoModelForSpeechSeq2Seq(whisper, proxy="split")


def test_greedy_tokens_are_those_of_transformers(proxy, whisper, features):
    result = proxy.generate(inputs={"input_features": features}, generation_len=32)
    expected = reference(whisper, features, max_new_tokens=32)
    assert expected.shape == (2, 32)
    assert len(np.unique(expected)) > 15
    np.testing.assert_array_equal(result.generated_ids, expected)


def test_every_steps_logits_are_those_of_one_pass(proxy, whisper, features, tmp_path):
    result = proxy.generate(
        inputs={"input_features": features}, generation_len=12, io_dir=tmp_path / "io"
    )
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(11))]
    fed = [dump.array(*step, "embedding.in.input_ids") for step in steps]
    ids = torch.from_numpy(np.concatenate(fed, axis=1))
    assert (ids[:, -11:].numpy() == result.generated_ids[:, :11]).all()
    with torch.no_grad():
        expected = whisper(input_features=features, decoder_input_ids=ids).logits.numpy()
        deaf = whisper(input_features=features * 0, decoder_input_ids=ids).logits.numpy()
    actual = [dump.array(*step, "lm_head.out.logits") for step in steps]
    np.testing.assert_allclose(np.concatenate(actual, axis=1), expected, atol=1e-4)
    assert np.abs(deaf - expected).max() > 0.05, "the model must listen for this to mean anything"


def test_a_start_of_ones_own_is_continued_as_transformers_continues_it(proxy, whisper, features):
    """``decoder_input_ids``, in place of language and task tokens."""
    start = torch.tensor([[3, 17, 42, 8], [3, 99, 5, 61]])
    result = proxy.generate(
        inputs={"input_features": features, "decoder_input_ids": start}, generation_len=12
    )
    expected = reference(whisper, features, decoder_input_ids=start, max_new_tokens=12)
    np.testing.assert_array_equal(result.generated_ids, expected)
    without = reference(whisper, features, max_new_tokens=12)
    assert not np.array_equal(expected[:, -12:], without[:, -12:])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (np.full((1, 2), 3), "decoder_input_ids has 1 rows for 2 sounds"),
        (np.full((2, 2), 10**6), "1000000 is no token of this model"),
        (np.full((2, 2), 1.5), "decoder_input_ids are float64"),
        (np.full((2, 500), 3), "refuses to generate"),
    ],
)
def test_a_start_that_cannot_be_right_is_refused(proxy, features, start, message):
    with pytest.raises(UsageError, match=message):
        proxy.generate(inputs={"input_features": features, "decoder_input_ids": start})


def test_beams_are_those_of_transformers(proxy, whisper, features):
    result = proxy.generate(inputs={"input_features": features}, generation_len=10, num_beams=3)
    expected = reference(whisper, features, max_new_tokens=10, num_beams=3)
    np.testing.assert_array_equal(result.generated_ids, expected)


def speechlike(seconds):
    """Samples whose pitch and loudness change all the time."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = 300 + 200 * np.sin(2 * np.pi * 1.7 * time)
    samples = np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) * (0.6 + 0.4 * np.sin(9 * time))
    return (samples * 0.5).astype(np.float32)


def test_a_path_an_array_and_features_are_the_same_sound(proxy, whisper, processor, tmp_path):
    sound = speechlike(0.9)
    path = tmp_path / "speech.flac"
    soundfile.write(path, sound, 16_000, subtype="PCM_24")
    inputs = processor(sound, sampling_rate=16_000, return_tensors="pt")
    expected = reference(whisper, inputs.input_features, max_new_tokens=6)
    text = processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    for given in (path, str(path), sound, {"array": sound, "sampling_rate": 16_000}, inputs):
        result = proxy.generate(given, processor, generation_len=6)
        np.testing.assert_array_equal(result.generated_ids, expected)
        assert str(result) == text


def test_a_long_sound_runs_in_windows_as_in_transformers(telling_time, processor):
    proxy = QEFFAutoModelForSpeechSeq2Seq(telling_time, proxy="split")
    sound = speechlike(2.6)
    inputs = processor(
        sound,
        sampling_rate=16_000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    with torch.no_grad():
        expected = telling_time.generate(
            inputs.input_features,
            attention_mask=inputs.attention_mask,
            return_timestamps=True,
            max_new_tokens=6,
        )
    result = proxy.generate(sound, processor, generation_len=6)
    np.testing.assert_array_equal(result.generated_ids, expected.numpy())
    assert result.segments[0][-1]["end"] > 1.0


def test_one_decoder_graph_gives_the_same(whisper, features):
    whole = QEFFAutoModelForSpeechSeq2Seq(whisper, proxy="whole")
    result = whole.generate(inputs={"input_features": features}, generation_len=8)
    expected = reference(whisper, features, max_new_tokens=8)
    np.testing.assert_array_equal(result.generated_ids, expected)


def test_the_token_embedding_and_its_tied_head_are_cut_and_positions_stay(proxy, whisper):
    hooks = Plugins.discover({}).hooks_for("whisper")
    assert hooks.locate_embedding(whisper, whisper.config) == Site("model.decoder.embed_tokens")
    assert hooks.locate_lm_head(whisper, whisper.config) == Site("proj_out")
    folder = proxy.export()
    with safe_open(folder / "vocabulary.safetensors", "numpy") as file:
        assert len(list(file.keys())) == 1
    with safe_open(folder / "body.safetensors", "numpy") as file:
        names = set(file.keys())
    assert "model.decoder.embed_positions.weight" in names
    assert not [name for name in names if "embed_tokens" in name or "proj_out" in name]


def test_a_decoder_without_its_encoder_is_refused(whisper):
    with pytest.raises(UnsupportedModelError, match="decoder without its encoder"):
        QEFFAutoModelForCausalLM(
            WhisperForCausalLM(copy.deepcopy(whisper.config)), proxy="split"
        ).export()


def test_cross_keys_of_another_layer_do_not_pass(whisper):
    hooks = Plugins.discover({}).hooks_for("whisper")
    sites = {
        "embedding": hooks.locate_embedding(whisper, whisper.config),
        "lm_head": hooks.locate_lm_head(whisper, whisper.config),
    }
    proxy = hooks.build_proxy(whisper, sites["embedding"], sites["lm_head"], "split")
    cross = proxy.part("encoder").module.cross.layers
    cross[0].keys, cross[1].keys = cross[1].keys, cross[0].keys
    with pytest.raises(CutError, match="proj_out"):
        SpeechFlow().verify(whisper, proxy, sites)


def test_a_dump_holds_encoder_and_decoder_with_each_layers_caches(proxy, features, tmp_path):
    inputs = {"input_features": features}
    first = proxy.generate(inputs, generation_len=4, io_dir=tmp_path / "a").io_folder
    names = set(read_dump(first).names())
    for layer in ("00", "01"):
        assert {
            f"encoder.out.cross_key_values_key.layer-{layer}",
            f"body.in.cross_key_values_value.layer-{layer}",
            f"body.out.present_key.layer-{layer}",
        } <= names
    second = proxy.generate(inputs, generation_len=4, io_dir=tmp_path / "b").io_folder
    assert compare_dumps(first, second).passed
    third = proxy.generate(
        {"input_features": features * 1.5}, generation_len=4, io_dir=tmp_path / "c"
    ).io_folder
    assert not compare_dumps(first, third).passed


def test_a_stub_gives_no_transcript(whisper, features):
    stub = QEFFAutoModelForSpeechSeq2Seq(whisper, proxy="stub")
    with pytest.raises(UsageError, match="stub"):
        stub.generate(inputs={"input_features": features})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "no sound"),
        ([], "no sound"),
        ({}, "no input_features"),
        ({"input_features": np.zeros((2, 16))}, "sounds, mel, frames"),
        ({"input_features": np.zeros((1, 16, 100)), "labels": [[1]]}, "nothing uses .* 'labels'"),
        ({"input_features": np.full((1, 16, 100), np.nan)}, "NaN"),
        ({"input_features": [[1, 2], [3]]}, "is no tensor"),
        ({"input_features": np.zeros((1, 16, 20))}, "20 frames, and a window has 100"),
        ({"input_features": np.zeros((1, 16, 100)), "attention_mask": np.ones((2, 3))}, "1, 100"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(proxy, inputs, message):
    with pytest.raises(UsageError, match=message):
        proxy.generate(inputs=inputs)


def test_sampling_follows_its_seed(proxy, features):
    ids = [
        proxy.generate(
            inputs={"input_features": features}, generation_len=8, temperature=1.0, seed=seed
        ).generated_ids.tolist()
        for seed in (3, 3, 4)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_settings_that_transformers_refuses_are_refused(proxy, features):
    with pytest.raises(UsageError, match="refuses"):
        proxy.generate(inputs={"input_features": features}, no_such_setting=1)
    with pytest.raises(UsageError, match="num_beams is 0"):
        proxy.generate(inputs={"input_features": features}, num_beams=0)
    with pytest.raises(UsageError, match="say the same"):
        proxy.generate(inputs={"input_features": features}, generation_len=1, max_new_tokens=1)


def test_a_decoder_over_30_s_of_sound_is_compared_before_it_runs_in_place(whisper, monkeypatch):
    """Its inputs are large; where nothing was compared, nothing would be warned of here."""
    config = copy.deepcopy(whisper.config)
    config.max_source_positions = 1500
    export = QEFFAutoModelForSpeechSeq2Seq(WhisperForConditionalGeneration(config).eval()).export()
    monkeypatch.setattr("qeff_proxy.backends.onnxruntime.check_rewriting._close", lambda *_: False)
    with pytest.warns(UserWarning, match="model part is not shown to equal its exported graph"):
        compiled = compile_export(read_export(export))
    with open_sessions(compiled) as sessions:
        assert not sessions["model"].runs_in_place()
