"""What QEfficient's scripts do with images before they are run, and the size they compile for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy_vision.qefficient import InternProcessor
from qeff_proxy_vision.tiny import with_random_weights
from transformers import (
    CLIPImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

pytestmark = pytest.mark.one_home

IMAGE_TOKEN = 98
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (45, 75, 3), np.uint8)
    return Image.fromarray(pixels).resize((50, 30))


def intern_processor():
    config = SimpleNamespace(
        force_image_size=28, vision_config=SimpleNamespace(patch_size=7), downsample_ratio=0.5
    )
    tokenizer = SimpleNamespace(convert_tokens_to_ids={"<IMG_CONTEXT>": 6}.get)
    return InternProcessor(SimpleNamespace(config=config), tokenizer)


def test_tiles_are_those_of_qefficients_processor(picture):
    """Of 5 : 3, two tiles side by side are the nearest; then an overview."""
    process = intern_processor()
    tiles = process.load_image(picture, max_num=2)
    wide = picture.resize((56, 28))
    images = [wide.crop((0, 0, 28, 28)), wide.crop((28, 0, 56, 28)), picture.resize((28, 28))]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = [(np.asarray(one) / 255 - mean) / std for one in images]
    np.testing.assert_allclose(tiles, np.stack(expected).transpose(0, 3, 1, 2), atol=1e-6)
    assert process.load_image(picture, input_size=14).shape[1:] == (3, 14, 14)
    assert process.model.img_context_token_id == 6


def test_prompts_are_those_of_qefficients_processor():
    process = intern_processor()
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    said = [("<|im_start|>user\n", "Hi")]
    asked = ["What <image> is it?", "And this?"]
    texts = process(torch.zeros(3, 3, 28, 28), asked, said, roles, num_patches_list=[2, 1])
    system, *turns = texts[0].split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n你是书生·万象")
    image = "<img>" + "<IMG_CONTEXT>" * 8 + "</img>"
    user, assistant = roles
    assert turns == [f"{user}Hi", f"{user}What {image} is it?", assistant]
    assert f"{user}<img>{'<IMG_CONTEXT>' * 4}</img>\nAnd this?" in texts[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2.5-VL whose tower has windows of two by two merged patches, with its processor."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    sides = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
    windows = {"patch_size": 7, "window_size": 28, "fullatt_block_indexes": [1], "depth": 3}
    text = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    config = Qwen2_5_VLConfig(
        vision_config={**sides, **windows},
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN - 1,
    )
    with_random_weights(Qwen2_5_VLForConditionalGeneration(config), 1.5).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 64 * 64}
    ).save_pretrained(folder)
    return folder


def inputs_for(folder, picture):
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=picture, return_tensors="pt")
    rows = int(images["image_grid_thw"].prod()) // 4
    ids = torch.tensor([[5, 9, *[IMAGE_TOKEN] * rows, 17, 4]])
    types = (ids == IMAGE_TOKEN).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        **images,
    }


@pytest.mark.parametrize(("height", "width", "grid"), [(30, 50, [4, 8]), (45, 75, [6, 10])])
def test_the_size_that_compile_is_given_is_that_of_the_images(
    height, width, grid, folder, picture, tmp_path, monkeypatch
):
    """The processor resizes; of the second size, the windows at the edges are smaller."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    face = QEFFAutoModelForImageTextToText.from_pretrained(folder, enable_proxy=True)
    face.compile(height=height, width=width, prefill_seq_len=8, ctx_len=64)
    inputs = inputs_for(folder, picture.resize((width, height)))
    assert inputs["image_grid_thw"][0, 1:].tolist() == grid
    asked = {"inputs": dict(inputs), "prefill_seq_len": 8, "batch_size": 1}
    prepared = face.model.prepare_inputs_for_generation(**asked)
    with torch.no_grad():
        expected = face.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    result = face.generate(inputs=prepared, generation_len=8)
    assert result.generated_ids.tolist() == expected.tolist()
    assert face.generate(**inputs, **GREEDY).generated_ids.tolist() == expected.tolist()
    assert len(set(expected[0].tolist())) > 3


def test_a_size_without_effect_is_said(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    make_model("llava").save_pretrained(tmp_path / "llava")
    load = partial(QEFFAutoModelForImageTextToText.from_pretrained, enable_proxy=True)
    face = load(tmp_path / "llava")
    with pytest.raises(UsageError, match="are several sizes, and graphs are made for one"):
        face.compile(height=[30, 60], width=[50, 100])
    with pytest.raises(CheckpointError, match="no image processor for images of 30 x 50 pixels"):
        face.compile(height=30, width=50)
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "llava")
    face = load(tmp_path / "llava")
    with pytest.warns(UserWarning, match="height and width are ignored") as caught:
        face.compile(height=30, width=50)
    assert caught[0].filename == __file__
