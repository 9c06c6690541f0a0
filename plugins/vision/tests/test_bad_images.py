"""Images, prompts and processors that do not fit are refused in a line, before an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import qeff_proxy_vision
from PIL import Image
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.cli import main
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.request import Request
from qeff_proxy_vision.inputs import preprocess

CHECKPOINT = Path(qeff_proxy_vision.__file__).parent / "checkpoints" / "tiny-llava"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an image and a video, and an empty home in it."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    return tmp_path


def exported(place):
    """What there is of exports."""
    return [one for one in (place / "home").rglob("*") if not one.name.endswith(".lock")]


def said(capsys):
    """The only line of an error."""
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    return line


PROMPTS = {
    "too many places": (["<image> is <image>", "--image", "a.png"], "2 image tokens (<image>)"),
    "too few places": (["<image>", "--image", "a.png", "--image", "a.png"], "and 2 images"),
    "no image": (["what <image>"], "no image is given"),
    "a video as an image": (["what", "--image", "v.mp4"], "v.mp4 is no image that can be read"),
    "a sound": (["what", "--audio", "a.wav"], "takes text and images, not sound"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_is_refused_before_the_export(case, place, capsys):
    arguments, message = PROMPTS[case]
    assert main(["generate", str(CHECKPOINT), *arguments]) == 2
    assert message in said(capsys)
    assert not exported(place)


def test_python_refuses_a_prompt_before_the_export(place):
    model = QEFFAutoModelForImageTextToText.from_pretrained(str(CHECKPOINT), proxy="split")
    with pytest.raises(UsageError, match="2 image tokens"):
        model.generate(prompts="<image> <image>", images="a.png")
    with pytest.raises(UsageError, match="no videos are taken"):
        model.generate(prompts="<image>", videos=["v.mp4"])
    assert not exported(place)


def test_a_video_token_is_not_read_as_text(place, monkeypatch):
    processor = load_processor(CHECKPOINT)
    monkeypatch.setattr(processor, "video_token", "<video>", raising=False)
    with pytest.raises(UsageError, match=r"video token \(<video>\), and no videos are taken"):
        preprocess(processor, Request(prompts=["what <video>"], images=["a.png"]))


SQUARE = {"height": 64, "width": 64}
PROCESSORS = {
    "image size": (
        {"image_processor": {"crop_size": SQUARE, "size": SQUARE}},
        "the tower takes ['batch', 3, 48, 48]",
    ),
    "patch size": ({"patch_size": 16}, "9 image tokens, and its images need 36"),
    "class token": ({"num_additional_image_tokens": 2}, "37 image tokens, and its images need 36"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_processor_that_disagrees_with_the_tower(case, place, capsys):
    changes, message = PROCESSORS[case]
    folder = place / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    inner = {**settings["image_processor"], **changes.get("image_processor", {})}
    file.write_text(json.dumps({**settings, **changes, "image_processor": inner}))
    for name, *more in (["inspect"], ["export"], ["verify"], ["generate", "<image>"]):
        image = ["--image", "a.png"] if more else []
        assert main([name, str(folder), *more, *image]) == 3
        line = said(capsys)
        assert "LlavaProcessor does not fit its tower" in line
        assert message in line
        assert not exported(place)
    with pytest.raises(CheckpointError, match="does not fit its tower"):
        QEFFAutoModelForImageTextToText.from_pretrained(str(folder), proxy="split").export()
