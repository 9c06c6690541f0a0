"""Transcripts of recordings, scored by their words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import qeff_proxy_audio
from qeff_proxy.cli import main
from qeff_proxy.score.score_answers import distance, words_of

pytestmark = pytest.mark.one_home

CHECKPOINTS = Path(qeff_proxy_audio.__file__).parent / "checkpoints"
RECORDINGS = sorted((CHECKPOINTS / "recordings").glob("*.flac"))


@pytest.mark.parametrize(
    ("given", "said", "errors"),
    [
        ("it is cold", "it is cold", 0),
        ("it is cold", "", 3),
        ("", "oh no", 2),
        ("it is very cold today", "it was cold today then", 3),  # replaced, deleted, inserted
        ("a b c d", "b c d a", 2),
        ("It's cold, today!", "it's COLD today", 0),
    ],
)
def test_the_distance_counts_words(given, said, errors):
    assert distance(words_of(given), words_of(said)) == errors


def score(capsys, *arguments):
    code = main(["score", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["tiny-whisper", "tiny-wav2vec2"])
def test_recordings_are_scored(model, tmp_path, capsys):
    """Both transcribe the recordings as their names say; one transcript given here is wrong."""
    assert len(RECORDINGS) == 6
    lines = [f"{file}\t{file.stem.replace('-', ' ').title()}." for file in RECORDINGS]
    lines[2] = f"{RECORDINGS[2]}\tzero zero"
    listed = tmp_path / "recordings.tsv"
    listed.write_text("\n".join(lines))
    code, value = score(capsys, CHECKPOINTS / model, "--text", listed)
    (one,) = value["backends"]
    measures = one["measures"]
    words = sum(len(words_of(line.partition("\t")[2])) for line in lines)
    wrong = distance(["zero", "zero"], RECORDINGS[2].stem.split("-"))
    assert code == 0
    assert value["scored"] == 6
    assert measures["wer"] == measures["wer_reference"] == pytest.approx(wrong / words)
    assert measures["wer_more"] == 0
    assert measures["same"] == measures["alike"] == 1
    low, high = one["intervals"]["wer"]
    assert 0 <= low < measures["wer"] < high
    code, value = score(
        capsys, CHECKPOINTS / model, "--text", listed, "--windows", 3, "--limit", "wer:0.01"
    )
    assert code == 1
    assert value["scored"] == 3
    assert value["backends"][0]["missed"] == [f"wer {wrong / 8:.4g} is above 0.01"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{0}\t", "is not an audio file, a tab and a text"),
        ("{0}\t...", "is not an audio file, a tab and a text"),
        ("{0}", "is not an audio file, a tab and a text"),
        ("drawing.png\twhat is it?", "is not an audio file, a tab and a text"),
        ("gone.wav\tone", "names gone.wav, which is not there"),
    ],
)
def test_a_list_that_is_none_is_refused_before_the_work(line, said, tmp_path, capsys):
    listed = tmp_path / "recordings.tsv"
    listed.write_text(f"{RECORDINGS[0]}\tone six\n\n{line.format(RECORDINGS[1])}\n")
    code, value = score(capsys, CHECKPOINTS / "tiny-whisper", "--text", listed)
    assert code == 2
    assert said in json.dumps(value)


def test_a_plain_text_is_none_for_a_model_of_sound(tmp_path, capsys, monkeypatch):
    """Which is known before anything is exported."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    text = tmp_path / "plain.txt"
    for words, said in (("Lily went to the park.\n", "is no text for"), ("", "has too few tokens")):
        text.write_text(words * 4)
        code, value = score(capsys, CHECKPOINTS / "tiny-whisper", "--text", text)
        assert code == 2
        assert said in json.dumps(value)
    assert not list((tmp_path / "home").rglob("*.onnx"))
