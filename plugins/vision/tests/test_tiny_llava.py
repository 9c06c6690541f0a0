"""The checkpoint that comes with the package says what drawings show."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import qeff_proxy_vision
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.dump import read_dump
from transformers import AutoModelForImageTextToText, AutoProcessor

CHECKPOINT = Path(qeff_proxy_vision.__file__).parent / "checkpoints" / "tiny-llava"
TOOL = Path(__file__).parents[3] / "tools" / "train_tiny_llava.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tiny_llava", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 3_000_000


def test_it_is_right_on_95_of_100_drawings_that_it_has_not_seen(tool):
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert tool.measure(model, processor, 200) >= 0.95


def test_the_proxy_names_what_a_png_shows(tool, tmp_path):
    image, answer = tool.draw(random.Random(5), 160)
    path = tmp_path / "drawing.png"
    image.save(path)
    model = QEFFAutoModelForImageTextToText.from_pretrained(CHECKPOINT, enable_proxy=True)
    model.export(tmp_path / "export")
    result = model.generate(
        prompts=tool.QUESTION, images=path, generation_len=12, io_dir=tmp_path / "io"
    )
    assert result.generated_texts == [answer]
    names = {str(name) for name in read_dump(tmp_path / "io").names()}
    assert "vision.out.image_features" in names
