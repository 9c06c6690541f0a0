"""Sound files and arrays become mono samples at the model's rate, or a clear error."""

from __future__ import annotations

import tracemalloc
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from qeff_proxy.errors import UsageError
from qeff_proxy.families.ogg import is_cut_off
from qeff_proxy_audio.sound import SoundWarning, feature_extractor_of, load_sound

RATE = 16_000


def tone(rate=RATE, seconds=0.5, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype("f4")


@pytest.mark.skipif(find_spec("pyctcdecode") is not None, reason="it is installed")
def test_a_processor_with_a_language_model_names_what_it_needs(tmp_path):
    """Without pyctcdecode and kenlm, transformers loads the tokenizer alone."""
    (tmp_path / "alphabet.json").write_text("{}")
    tokenizer = SimpleNamespace(name_or_path=str(tmp_path))
    with pytest.raises(UsageError, match=r"alphabet\.json .* which needs pyctcdecode and kenlm"):
        feature_extractor_of(tokenizer)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_each_kind_of_file_is_read(tmp_path, kind):
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, tone(), RATE)
    samples = load_sound(path, RATE)
    assert samples.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(spectrum.argmax() * RATE / len(samples) - 440) < 5


def test_eight_kilohertz_stereo_is_resampled_and_mixed_with_a_warning(tmp_path):
    path = tmp_path / "phone.wav"
    left, right = tone(8_000), tone(8_000, hertz=880.0)
    soundfile.write(path, np.stack([left, right], 1), 8_000)
    with pytest.warns(SoundWarning) as said:
        samples = load_sound(str(path), RATE)
    assert ["2 channels" in str(one.message) for one in said] == [True, False]
    assert "8000 to 16000" in str(said[1].message)
    assert "above 4000 Hz it holds nothing" in str(said[1].message)
    inner = slice(800, -800)
    expected = (tone() + tone(hertz=880.0)) / 2
    assert np.abs(samples[inner] - expected[inner]).max() < 1e-2


@pytest.mark.parametrize(
    "sound",
    [
        tone(),
        tone().astype("f8"),
        tone().tolist(),
        torch.from_numpy(tone()),
        (tone() * 32768).astype(np.int16),
        {"array": tone(), "sampling_rate": RATE},
        tone()[None],
        tone()[:, None],
    ],
    ids=["float32", "float64", "list", "torch", "int16", "mapping", "row", "column"],
)
def test_arrays_of_each_form_are_the_same_sound(sound):
    np.testing.assert_allclose(load_sound(sound, RATE), tone(), atol=1e-4)


def test_channels_may_stand_on_either_axis():
    stereo = np.stack([tone(), tone() * 0.5])
    for sound in (stereo, stereo.T):
        with pytest.warns(SoundWarning, match="2 channels"):
            np.testing.assert_allclose(load_sound(sound, RATE), tone() * 0.75, atol=1e-6)


def test_the_rate_of_an_array_can_be_said():
    with pytest.warns(SoundWarning, match="48000"):
        assert len(load_sound(tone(48_000), RATE, 48_000)) == len(tone())


def test_a_very_quiet_sound_is_heard_with_a_warning():
    with pytest.warns(SoundWarning, match="very quiet"):
        assert len(load_sound(tone() * 1e-3, RATE)) == len(tone())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"This is text, and no sound.\n" * 50, "no sound file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + b"\0" * 4096, "ffmpeg"),
        (b"RIFF\xff\xff\0\0WAVEfmt ", "no sound file"),
    ],
    ids=["empty", "text", "video", "cut"],
)
def test_a_file_that_holds_no_sound_is_refused(tmp_path, content, message):
    path = tmp_path / "speech.wav"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_sound(path, RATE)


def test_a_file_without_samples_is_refused(tmp_path):
    path = tmp_path / "empty.wav"
    soundfile.write(path, np.zeros(0, "f4"), RATE)
    with pytest.raises(UsageError, match="no samples"):
        load_sound(path, RATE)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0, "f4"), "no samples"),
        (np.zeros(RATE, "f4"), "silence"),
        (np.full(RATE, 3e-5, "f4"), "silence"),
        (np.full(RATE, 0.5, "f4"), "silence"),
        (tone() * 30_000, "Divide them"),
        (tone()[:200], "too short"),
        (b"RIFF", "bytes is no sound"),
        (open, "is no sound"),
        ({"array": tone(), "sampling_rate": 16}, "16000"),
        (np.array([0.1, np.nan], "f4"), "NaN"),
        (np.array([0.1, np.inf], "f4"), "NaN or infinite"),
        (np.zeros((20, 2_000), "f4"), "several lengths"),
        (np.zeros((2, 2, 2), "f4"), "no sound"),
        (np.array(["a"]), "no sound"),
        (np.ones(100, np.uint8), "no sound"),
        ("/no/such/file.wav", "no sound file"),
        (None, "no sound"),
        ({"array": tone(), "sampling_rate": 0}, "number of Hz"),
        ({"array": tone(), "sampling_rate": "16k"}, "number of Hz"),
    ],
)
def test_what_is_no_sound_is_refused(sound, message):
    with pytest.raises(UsageError, match=message):
        load_sound(sound, RATE)


def test_an_ogg_that_was_cut_within_a_page_or_between_two_is_seen(tmp_path):
    path = tmp_path / "sound.ogg"
    noise = np.random.default_rng(0).standard_normal(64_000).astype(np.float32) * 0.1
    soundfile.write(path, noise, 16_000, format="OGG", subtype="OPUS")
    whole = path.read_bytes()
    pages = [at for at in range(len(whole)) if whole[at : at + 4] == b"OggS"]
    assert len(pages) > 4
    assert not is_cut_off(path)
    for end in (pages[-1], pages[-1] + 12, pages[-1] + 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert is_cut_off(path), end


@pytest.mark.parametrize("kind", ["wav", "mp3", "ogg"])
def test_a_file_that_was_cut_off_is_told_from_a_whole_one(tmp_path, kind):
    path = tmp_path / f"sound.{kind}"
    noise = np.random.default_rng(0).standard_normal(160_000).astype(np.float32) * 0.1
    soundfile.write(path, noise, 16_000)
    assert len(load_sound(path, 16_000)) >= 159_000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(SoundWarning, match="it may have been cut off"):
        load_sound(path, 16_000)


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    path = tmp_path / "lies.flac"
    soundfile.write(path, tone(), RATE)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the number of samples, 36 bits: now 256 GiB of them
    data[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="no sound file that can be read"):
            load_sound(path, RATE)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_small_file_of_too_many_samples_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qeff_proxy.families.sound.MOST_SAMPLES", 1000)
    path = tmp_path / "long.flac"
    soundfile.write(path, tone(), RATE)
    with pytest.raises(UsageError, match="holds more than 1,000 samples"):
        load_sound(path, RATE)
