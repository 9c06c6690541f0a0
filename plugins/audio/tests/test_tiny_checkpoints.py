"""The checkpoints that come with the package hear what held-out voices say, through proxies."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import qeff_proxy_audio
import soundfile
import soxr
from qeff_proxy import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq, Request
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UsageError
from qeff_proxy.verify.verify_model import verify_model
from qeff_proxy_audio.sound import EXAMPLE, SoundWarning

pytestmark = pytest.mark.one_home

ROOT = Path(__file__).parents[3]
CHECKPOINTS = Path(qeff_proxy_audio.__file__).parent / "checkpoints"
RECORDINGS = sorted((CHECKPOINTS / "recordings").glob("*.flac"))
FACES = {
    "tiny-whisper": QEFFAutoModelForSpeechSeq2Seq,
    "tiny-wav2vec2": QEFFAutoModelForCTC,
}


def said(path):
    return path.stem.replace("-", " ")


def recognizer(name):
    return FACES[name].from_pretrained(CHECKPOINTS / name, enable_proxy=True)


def test_there_are_recordings():
    assert len(RECORDINGS) == 6


@pytest.mark.parametrize("name", FACES)
def test_a_checkpoint_is_small(name):
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) < 2_000_000


@pytest.mark.parametrize("name", FACES)
def test_recordings_of_held_out_voices_are_heard(name, tmp_path):
    model = recognizer(name)
    heard = {path.stem: str(model.generate(inputs=str(path))) for path in RECORDINGS}
    assert heard == {path.stem: said(path) for path in RECORDINGS}
    samples, rate = soundfile.read(RECORDINGS[0], dtype="float32")
    stereo = tmp_path / "stereo.mp3"
    soundfile.write(stereo, np.stack([soxr.resample(samples, rate, 44_100)] * 2, 1), 44_100)
    with pytest.warns(SoundWarning, match=r"resampled|channels"):
        result = model.generate(inputs=str(stereo), io_dir=tmp_path / "io")
    assert str(result) == said(RECORDINGS[0])
    assert "lm_head.out.logits" in read_dump(result.io_folder).names()


def test_a_long_sound_is_heard_in_windows_or_refused_never_made_up():
    pieces = [soundfile.read(path, dtype="float32")[0] for path in RECORDINGS]
    long = np.concatenate(pieces)
    heard = recognizer("tiny-wav2vec2").generate(
        inputs=long, chunk_length_s=4.0, stride_length_s=1.0
    )
    # It was trained on one recording at a time, and puts no space between two.
    assert str(heard).replace(" ", "") == "".join(map(said, RECORDINGS)).replace(" ", "")
    whisper = recognizer("tiny-whisper")
    with pytest.raises(UsageError, match="at most 5 s of sound"):
        whisper.generate(inputs=long)
    with pytest.raises(UsageError, match="no timestamp tokens"):
        whisper.generate(inputs=pieces[0], return_timestamps=True)


@pytest.mark.parametrize("name", FACES)
def test_the_command_line_takes_sound_files(name, capsys):
    files = [str(path) for path in RECORDINGS[:2]]
    assert main(["generate", str(CHECKPOINTS / name), *files]) == 0
    assert capsys.readouterr().out.splitlines() == [said(path) for path in RECORDINGS[:2]]
    assert main(["generate", str(CHECKPOINTS / name), files[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated_texts"] == [said(RECORDINGS[0])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], "there is no sound file 'hello'"),
        ([str(RECORDINGS[0]), "--image", "x.png"], "takes sound, not images"),
        (["5,6", "--ids"], "takes sound, not token ids. Give a sound file"),
        ([str(RECORDINGS[0]), "--num-beams", "3"], "generates no tokens one by one"),
    ],
)
def test_what_a_recognizer_does_not_take_is_refused(arguments, message, capsys):
    assert main(["generate", str(CHECKPOINTS / "tiny-wav2vec2"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", FACES)
def test_verify_lets_it_hear_a_recording_and_openvino_passes(name, capsys):
    export = recognizer(name).export()
    assert main(["verify", str(export), "--backend", "openvino", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    heard = found["decoded"]
    assert (heard["texts"] if name == "tiny-whisper" else heard) == ["two zero nine four"]
    assert found["input"]["audio"] == [str(EXAMPLE)]
    (result,) = found["backends"]
    assert result["equal_tokens"] == result["tokens"] > 4


@pytest.mark.parametrize(
    ("name", "unit", "amount"),
    [("tiny-whisper", "tokens", 4), ("tiny-wav2vec2", "seconds of sound", 1.72)],
)
def test_verify_tells_its_speed_beside_the_uncut_model(name, unit, amount, capsys):
    export = recognizer(name).export()
    given = ["--speed", "--turns", "1", "--num-cores", "1", "--json"]
    assert main(["verify", str(export), *given]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert (speed["unit"], round(speed["amount"], 2)) == (unit, amount)
    assert speed["best"] == "onnxruntime"
    wanted = f"qeff-proxy generate {export} INPUT --backend onnxruntime --num-cores 1"
    assert speed["command"] == wanted
    assert speed["pytorch"]["a_second"] > 0


def test_verify_says_once_what_there_is_to_say_of_a_sound(tmp_path):
    samples, rate = soundfile.read(EXAMPLE, dtype="float32")
    path = tmp_path / "half.wav"
    soundfile.write(path, samples[::2], rate // 2)
    with pytest.warns(SoundWarning) as caught:
        found = verify_model(
            recognizer("tiny-wav2vec2").export(),
            ["onnxruntime", "openvino"],
            Request(audio=(str(path),)),
        )
    assert found.passed
    assert len(caught) == 1
    assert "is resampled from 8000 to 16000 Hz" in str(caught[0].message)


@pytest.mark.parametrize("name", FACES)
def test_what_verify_cannot_let_it_hear_is_said_before_anything_is_made(name, capsys, tmp_path):
    given = ["verify", str(CHECKPOINTS / name), "--output", str(tmp_path / "export")]
    assert main([*given, "--prompt", "hello"]) == 2
    assert main([*given, "--audio", "none.wav"]) == 2
    assert main([*given, "--image", "none.png"]) == 2
    assert main([*given, "--ids", "5,6"]) == 2
    assert main([*given, "--audio", str(EXAMPLE), "--ids", "5"]) == 2
    assert main([*given, "--proxy", "stub"]) == 2
    errors = capsys.readouterr().err.splitlines()
    told = (
        "sound, not text",
        "no sound file 'none.wav'",
        "sound, not images",
        "nothing uses the input 'input_ids'",
    )
    told += ("--audio and --ids", "stub's outputs")
    for message, error in zip(told, errors, strict=True):
        assert message in error
    assert not (tmp_path / "export").exists()


def test_the_demo_prints_what_both_heard(capsys):
    assert main(["demo", "whisper", "wav2vec2", "--json"]) == 0
    demos = json.loads(capsys.readouterr().out)["demos"]
    for one in demos.values():
        assert one["text"].endswith("\ntwo zero nine four")
        assert one["parity"]["passed"]
        assert one["parity"]["max_difference"] < 1e-4
        assert (Path(one["io_folder"]) / "manifest.json").is_file()
    assert demos["whisper"]["parity"]["steps"] == 5


def test_the_example_transcribes_with_both(forked):
    def run():
        sys.argv = ["audio_model.py", "--tiny"]
        runpy.run_path(str(ROOT / "examples" / "audio_model.py"), run_name="__main__")

    done = forked(run)
    assert done.returncode == 0, done.stderr
    for name in FACES:
        assert f"{name}: seven three one\n" in done.stdout
    assert len([line for line in done.stdout.splitlines() if "inputs and outputs" in line]) == 2
