"""The checkpoint that comes with the package says what drawings show."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import random
from pathlib import Path

import pytest
import qeff_proxy_vision
from PIL import Image
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.load.load_model import load_model
from qeff_proxy.run.example_request import DEFAULT_QUESTION
from qeff_proxy_vision import demo, images
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.one_home

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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the demo says; its export is there for the other tests."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("QEFF_HOME", str(tmp_path_factory.mktemp("home")))
        assert main(["demo", "llava", "--json"]) == 0
    return json.loads(said.getvalue())["demos"]["llava"]


def test_the_demo_names_what_a_png_shows(report, capsys):
    assert report["text"].endswith("a green triangle on the right")
    parity = report["parity"]
    assert parity["equal_tokens"] == parity["steps"] == 7
    assert parity["max_difference"] < 1e-4 < parity["largest_logit"]
    names = {str(name) for name in read_dump(Path(report["io_folder"])).names()}
    assert "vision.out.image_features" in names
    drawing = CHECKPOINT.parent / "drawings" / "drawing.png"
    question = ["generate", report["export"], "What is this ?", "--image", str(drawing)]
    assert main(question) == 0
    assert capsys.readouterr().out == "a green triangle on the right\n"


def test_verify_shows_it_the_drawing_and_openvino_passes(report, capsys):
    assert main(["verify", report["export"], "--backend", "openvino", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decoded"] == ["a green triangle on the right"]
    assert found["input"]["images"] == [str(images.DRAWING)]
    (result,) = found["backends"]
    assert result["equal_tokens"] == result["tokens"] == 7


def test_verify_says_what_went_in_and_that_no_layers_are_tapped(report, capsys):
    given = ["--backend", "torch", "--max-new-tokens", "1", "--ids", "5,6,7"]
    assert main(["verify", report["export"], *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "input: input_ids [1, 3]" in lines
    assert [line for line in lines if line.startswith("PyTorch says: '")]
    assert [line for line in lines if line.startswith("Note: there are no layer taps")]
    (note,) = [line for line in lines if "the vision part did not run" in line]
    assert "--image FILE" in note


def test_a_question_without_an_image_gets_a_hint(report, capsys):
    question = ["generate", report["export"], "What is this ?", "--max-new-tokens", "1"]
    assert main(question) == 0
    assert "give one with --image FILE" in capsys.readouterr().err
    assert main([*question, "--image", str(images.DRAWING)]) == 0
    assert "--image" not in capsys.readouterr().err
    question[2] = "<image> What is this ?"
    assert main(question) == 2
    assert "no image is given. Give one with --image FILE" in capsys.readouterr().err


def test_verify_asks_about_an_image_and_refuses_a_sound(report, capsys):
    given = ["verify", report["export"], "--backend", "torch", "--max-new-tokens", "1"]
    assert main([*given, "--image", str(images.DRAWING), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"]["prompts"] == [DEFAULT_QUESTION]
    assert main([*given, "--image", "none.png"]) == 2
    assert main([*given, "--audio", "none.wav"]) == 2
    missing, sound = capsys.readouterr().err.splitlines()
    assert "there is no image file 'none.png'" in missing
    assert "takes text and images, not sound" in sound


def test_the_drawing_of_the_demo_is_made_as_those_the_model_was_trained_on(tool):
    drawing, answer = tool.draw(random.Random(102), 160)
    assert answer == "a green triangle on the right"
    with Image.open(CHECKPOINT.parent / "drawings" / "drawing.png") as shown:
        assert shown.convert("RGB").tobytes() == drawing.tobytes()


@pytest.mark.parametrize("name", ["llava_next", "granite4_vision", "gemma3", "internvl", "molmo2"])
def test_the_demos_of_other_families_make_a_checkpoint_and_leave_nothing(name):
    made = getattr(demo, name)()
    folder = Path(made.checkpoint)
    assert load_model(str(folder)).model.config.model_type == name
    assert made.request.inputs["pixel_values"].shape[0] == 2
    del made
    gc.collect()
    assert not folder.parent.exists()
