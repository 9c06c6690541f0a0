"""CTC recognizers on ONNX Runtime, against PyTorch alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCTC
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CutError, UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Absent, Site
from qeff_proxy_audio.ctc_flow import CtcFlow, windows_of
from safetensors import safe_open
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

FAMILIES = ("wav2vec2", "wav2vec2-layer", "hubert", "wavlm", "data2vec-audio")


def noise(samples, seed=0):
    return np.random.default_rng(seed).standard_normal((1, samples)).astype(np.float32)


def logits_of(model, values):
    with torch.no_grad():
        return model(torch.from_numpy(values)).logits[0].numpy()


@pytest.fixture
def processor(tmp_path):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz", "'"]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_length_gives_the_logits_of_pytorch(family, ctc_model):
    model = ctc_model(family)
    proxy = QEFFAutoModelForCTC(model, proxy="split")
    for samples in (900, 5_000, 33_333):
        values = noise(samples)
        result = proxy.generate(inputs={"input_values": values})
        expected = logits_of(model, values)
        np.testing.assert_allclose(result.logits[0], expected, atol=1e-5)
        best = np.sort(expected, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-4
        assert clear.mean() > 0.95
        assert (result.predicted_ids[0] == expected.argmax(-1))[clear].all()


def test_sounds_of_several_lengths_do_not_disturb_each_other(wav2vec2):
    """With group normalization, zeros behind a sound would change all of it."""
    values = np.zeros((2, 6_000), np.float32)
    mask = np.zeros((2, 6_000), int)
    for row, samples in enumerate((6_000, 2_345)):
        values[row, :samples] = noise(samples, row)
        mask[row, :samples] = 1
    result = QEFFAutoModelForCTC(wav2vec2, proxy="split").generate(
        inputs={"input_values": values, "attention_mask": mask}
    )
    alone = logits_of(wav2vec2, values[1:, :2_345])
    np.testing.assert_allclose(result.logits[1], alone, atol=1e-5)
    padded = logits_of(wav2vec2, values[1:])[: len(alone)]
    assert np.abs(padded - alone).max() > 1e-3


def test_the_head_is_cut_with_its_bias_and_there_is_no_embedding(wav2vec2):
    hooks = Plugins.discover({}).hooks_for("wav2vec2")
    assert isinstance(hooks.locate_embedding(wav2vec2, wav2vec2.config), Absent)
    assert hooks.locate_lm_head(wav2vec2, wav2vec2.config) == Site("lm_head")
    folder = QEFFAutoModelForCTC(wav2vec2, proxy="split").export()
    with safe_open(folder / "vocabulary.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["lm_head.bias", "lm_head.weight"]
    with safe_open(folder / "body.safetensors", "numpy") as file:
        assert not [name for name in file.keys() if name.startswith("lm_head")]  # noqa: SIM118


def test_a_head_without_its_bias_does_not_pass(wav2vec2):
    hooks = Plugins.discover({}).hooks_for("wav2vec2")
    sites = {
        "embedding": hooks.locate_embedding(wav2vec2, wav2vec2.config),
        "lm_head": hooks.locate_lm_head(wav2vec2, wav2vec2.config),
    }
    proxy = hooks.build_proxy(wav2vec2, sites["embedding"], sites["lm_head"], "split")
    head = torch.nn.Linear(32, 32, bias=False)
    head.weight = wav2vec2.lm_head.weight
    proxy.part("lm_head").module.head = head
    with pytest.raises(CutError, match="lm_head at lm_head"):
        CtcFlow().verify(wav2vec2, proxy, sites)


def test_a_sound_becomes_a_transcript_of_real_logits(wav2vec2, processor):
    sound = noise(8_000)[0]
    result = QEFFAutoModelForCTC(wav2vec2, proxy="split").generate(processor, inputs=sound)
    values = processor(sound, sampling_rate=16_000, return_tensors="np").input_values
    expected = processor.decode(logits_of(wav2vec2, values).argmax(-1))
    assert result.texts == [expected]
    assert str(result) == expected


def test_one_graph_gives_the_same(wav2vec2):
    values = noise(3_000)
    whole = QEFFAutoModelForCTC(wav2vec2, proxy="whole").generate(inputs={"input_values": values})
    np.testing.assert_allclose(whole.logits[0], logits_of(wav2vec2, values), atol=1e-5)


def test_a_stub_gives_no_transcript(wav2vec2):
    proxy = QEFFAutoModelForCTC(wav2vec2, proxy="stub")
    with pytest.raises(UsageError, match="stub"):
        proxy.generate(inputs={"input_values": noise(3_000)})


def test_a_dump_holds_body_and_head(wav2vec2, tmp_path):
    values = noise(3_000)
    proxy = QEFFAutoModelForCTC(wav2vec2, proxy="split")
    result = proxy.generate(inputs={"input_values": values}, io_dir=tmp_path / "io")
    dump = read_dump(result.io_folder)
    assert dump.names() == [
        "body.in.input_values",
        "body.out.last_hidden_state",
        "lm_head.in.last_hidden_state",
        "lm_head.out.logits",
    ]
    np.testing.assert_array_equal(dump.array("prefill", 0, "body.in.input_values"), values)


# Long sounds

SETTINGS = {"samples_per_frame": 320, "shortest": 400}


def frames_of(samples):
    return (samples - SETTINGS["shortest"]) // SETTINGS["samples_per_frame"] + 1


def test_an_adapter_behind_the_encoder_makes_fewer_frames(ctc_model):
    """Three layers of stride 2: transformers' frames, for a sound in one window and in several."""
    model = ctc_model("wav2vec2", add_adapter=True, num_adapter_layers=3, adapter_stride=2)
    proxy = QEFFAutoModelForCTC(model, proxy="split")
    values = noise(4 * 16_000 + 123)
    expected = logits_of(model, values)
    whole = proxy.generate(inputs={"input_values": values})
    np.testing.assert_allclose(whole.logits[0], expected, atol=1e-4)
    windows = proxy.generate(
        inputs={"input_values": values}, chunk_length_s=2.0, stride_length_s=0.5
    )
    assert windows.logits[0].shape == expected.shape


@pytest.mark.parametrize("seconds", [0.5, 3.0, 3.9, 4.0, 4.3, 10.0, 61.7])
def test_windows_join_without_a_gap_or_a_frame_twice(seconds):
    samples = int(seconds * 16_000)
    covered = []
    for begin, end, first, last in windows_of(samples, 3.0, 0.5, SETTINGS):
        assert begin % SETTINGS["samples_per_frame"] == 0
        assert end <= samples
        assert last <= frames_of(end - begin)
        offset = begin // SETTINGS["samples_per_frame"]
        covered += range(offset + first, offset + last)
    assert covered == list(range(frames_of(samples)))


def test_a_sound_in_windows_gives_nearly_what_it_gives_at_once(ctc_model):
    model = ctc_model("wav2vec2-layer")
    proxy = QEFFAutoModelForCTC(model, proxy="split")
    inputs = {"input_values": noise(40_000)}
    whole = proxy.generate(inputs=inputs)
    pieces = proxy.generate(inputs=inputs, chunk_length_s=1.0, stride_length_s=0.25)
    assert pieces.logits[0].shape == whole.logits[0].shape
    assert (pieces.predicted_ids[0] == whole.predicted_ids[0]).mean() > 0.9


# Bad input


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (None, {}, "no sound"),
        ([], {}, "no sound"),
        ({}, {}, "no input_values"),
        ({"input_values": np.zeros((1, 0))}, {}, "none of them zero"),
        ({"input_values": "speech.wav"}, {}, "is no tensor"),
        (
            {"input_values": noise(900), "attention_mask": np.arange(900)[None] > 99},
            {},
            "ones before zeros",
        ),
        ({"input_values": np.full((1, 900), np.nan)}, {}, "NaN"),
        ({"input_values": noise(900), "labels": [[1]]}, {}, "nothing uses the input 'labels'"),
        ({"input_values": noise(20)}, {}, "at least"),
        ({"input_values": noise(900)}, {"chunk_length_s": 1, "stride_length_s": 0.5}, "leaves"),
        ({"input_values": noise(900)}, {"chunk_length_s": -1}, "number of seconds"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(wav2vec2, inputs, settings, message):
    with pytest.raises(UsageError, match=message):
        QEFFAutoModelForCTC(wav2vec2, proxy="split").generate(inputs=inputs, **settings)


def test_a_sound_without_a_processor_says_what_to_pass(wav2vec2):
    with pytest.raises(UsageError, match="made in memory"):
        QEFFAutoModelForCTC(wav2vec2, proxy="split").generate(inputs=noise(900)[0])
