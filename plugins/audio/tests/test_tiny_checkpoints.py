"""The checkpoints that come with the package hear what held-out voices say, through proxies."""

from __future__ import annotations

from pathlib import Path

import pytest
import qeff_proxy_audio
from qeff_proxy import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.dump import read_dump

CHECKPOINTS = Path(qeff_proxy_audio.__file__).parent / "checkpoints"
RECORDINGS = sorted((CHECKPOINTS / "recordings").glob("*.flac"))
FACES = {
    "tiny-whisper": QEFFAutoModelForSpeechSeq2Seq,
    "tiny-wav2vec2": QEFFAutoModelForCTC,
}
PRESENT = [name for name in FACES if (CHECKPOINTS / name).is_dir()]


def said(path):
    return path.stem.replace("-", " ")


def test_there_are_recordings_and_checkpoints():
    assert len(RECORDINGS) == 6
    assert PRESENT


@pytest.mark.parametrize("name", PRESENT)
def test_a_checkpoint_is_small(name):
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) < 2_000_000


@pytest.mark.parametrize("name", PRESENT)
def test_recordings_of_held_out_voices_are_heard(name, tmp_path):
    model = FACES[name].from_pretrained(CHECKPOINTS / name, enable_proxy=True)
    heard = {path.stem: str(model.generate(inputs=str(path))) for path in RECORDINGS}
    assert heard == {path.stem: said(path) for path in RECORDINGS}
    result = model.generate(inputs=str(RECORDINGS[0]), io_dir=tmp_path / "io")
    assert "lm_head.out.logits" in read_dump(result.io_folder).names()
