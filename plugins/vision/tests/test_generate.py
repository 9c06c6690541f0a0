"""A checkpoint with a processor, through QEfficient's calls: prompts and images in, text out."""

from __future__ import annotations

import resource
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from qeff_proxy import QEFFAutoModelForImageTextToText, Request
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.flows.flow import load_flow
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

WORDS = ["<unk>", "<pad>", "<eos>", "USER:", "ASSISTANT:", *(f"w{i}" for i in range(93)), "<image>"]
TEMPLATE = (
    "{% for message in messages %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor():
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    """The tiny LLaVA, saved with a processor."""
    folder = tmp_path_factory.mktemp("llava")
    make_model("llava").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where exports are kept, so that the second of the same is a lookup."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def face(folder, home, monkeypatch):
    """The model, loaded as a user would, not exported."""
    monkeypatch.setenv("QEFF_HOME", str(home))
    return QEFFAutoModelForImageTextToText.from_pretrained(
        folder, kv_offload=True, enable_proxy=True
    )


def preprocess(face, prompts, images=(), **options):
    request = Request(prompts=prompts, images=images, options=options)
    return face._hooks.preprocess(face.processor(), request)


def test_the_example_runs_on_a_folder(folder, home, monkeypatch, capsys):
    monkeypatch.setenv("QEFF_HOME", str(home))
    example = Path(__file__).parents[3] / "examples" / "image_model.py"
    monkeypatch.setattr(sys, "argv", [str(example), "standard", str(folder), "--prompt", "w5"])
    with pytest.warns(UserWarning, match="ctx_len 2048 is more than the 256 positions"):
        runpy.run_path(str(example), run_name="__main__")
    answer, told = capsys.readouterr().out.strip().splitlines()
    assert len(answer.split()) == 10
    assert read_dump(Path(told.split(": ")[1])).names()


def test_qefficients_calls_give_what_the_uncut_model_gives(face, picture):
    processor = face.processor()
    inputs = processor(images=picture, text="USER: <image> w5 ASSISTANT:", return_tensors="pt")
    with pytest.warns(UserWarning, match="ctx_len 2048 is more than the 256 positions"):
        face.compile(num_devices=1, prefill_seq_len=128, ctx_len=2048, num_patches=1)
    result = face.generate(inputs=inputs, generation_len=10, write_io=True)
    with torch.no_grad():
        output = face.model.generate(**inputs, max_new_tokens=10, do_sample=False)
    expected = output[:, inputs["input_ids"].shape[1] :]
    assert result.generated_ids.tolist() == expected.tolist()

    names = {str(name) for name in read_dump(result.io_folder).names()}
    assert {name.split(".")[0] for name in names} == {"vision", "embedding", "body", "lm_head"}
    assert {"vision.in.pixel_values", "vision.out.image_features"} <= names

    by_prompt = face.generate(prompts="w5", images=picture, max_new_tokens=10, chat=True)
    assert by_prompt.generated_ids.tolist() == expected.tolist()
    assert by_prompt.generated_texts == processor.batch_decode(expected, skip_special_tokens=True)

    beams = face.generate(inputs=inputs, generation_len=6, num_beams=3, do_sample=False)
    with torch.no_grad():
        output = face.model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.generated_ids.tolist() == output[:, inputs["input_ids"].shape[1] :].tolist()

    face.compile(ctx_len=10)
    with pytest.raises(UsageError, match="do not fit into a context"):
        face.generate(inputs=inputs, generation_len=5)
    without_pixels = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    face.compile()
    with pytest.raises(UsageError, match="16 image tokens, and there is no image"):
        face.generate(inputs=without_pixels, generation_len=5)
    two = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(UsageError, match="16 image tokens, and its images need 32"):
        face.generate(inputs=two, generation_len=5)
    with pytest.raises(UsageError, match="nothing uses the input 'pixel_values_videos'"):
        face.generate(inputs={**inputs, "pixel_values_videos": inputs["pixel_values"]})
    said = {**inputs, "image_sizes": [[8, 8]], "token_type_ids": 0 * inputs["input_ids"]}
    assert face.generate(inputs=said, generation_len=2).generated_ids.tolist() == [
        expected[0, :2].tolist()
    ]
    no_token = {**inputs, "input_ids": inputs["input_ids"].clamp(max=50)}
    with pytest.raises(UsageError, match="no image token"):
        face.generate(inputs=no_token, generation_len=5)


def test_a_prompt_that_says_where_its_image_belongs_is_left_as_it_is(face, picture):
    tensors = preprocess(face, ["w1 <image> w2"], [picture])
    assert tensors["input_ids"].tolist() == [[6] + [98] * 16 + [7]]
    assert tensors["pixel_values"].shape == (1, 3, 28, 28)


def test_a_prompt_that_does_not_goes_into_the_chat_template(face, picture):
    tensors = preprocess(face, ["w1"], [picture, picture])
    assert tensors["input_ids"].tolist() == [[3] + [98] * 32 + [6, 4]]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t~n.t %}{% endfor %}",
    ],
)
def test_a_chat_template_without_measure_is_refused(face, picture, template):
    processor = face.processor()
    processor.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="chat template takes more than 1 GB"):
        face._hooks.preprocess(processor, Request(prompts=["w1"], images=[picture]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_prompts_are_padded_on_the_left_and_images_dealt_out(face, picture):
    prompts = ["w1 <image> <image>", "w2", "<image> w3"]
    tensors = preprocess(face, prompts, [picture] * 3)
    assert tensors["pixel_values"].shape[0] == 3
    assert (tensors["input_ids"] == 98).sum(1).tolist() == [32, 0, 16]
    assert tensors["attention_mask"].sum(1).tolist() == [33, 1, 17]
    assert tensors["attention_mask"][1].tolist() == [0] * 32 + [1]
    nested = preprocess(face, prompts, [[picture, picture], [], [picture]])
    assert all((nested[name] == tensors[name]).all() for name in tensors)


def test_the_processor_is_as_it_was(face, picture):
    processor = face.processor()
    processor.tokenizer.padding_side = "right"
    face._hooks.preprocess(processor, Request(prompts=["w1 <image>"], images=[picture]))
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("prompts", "count", "options", "reason"),
    [
        (
            ["w1 <image>"],
            0,
            {},
            r"1 image token \(<image>\), and no image is given\. Give one with --image FILE",
        ),
        (["w1"], 1, {"chat": False}, r"0 image tokens .* and 1 image\."),
        (["<image> <image>"], 1, {}, r"2 image tokens .* and 1 image\."),
        (
            ["<image>", "w1"],
            2,
            {},
            r"2 prompts have 1 image token .*, and there are 2 images",
        ),
        (["  "], 1, {}, "empty"),
    ],
)
def test_images_and_places_that_do_not_match(face, picture, prompts, count, options, reason):
    with pytest.raises(UsageError, match=reason):
        preprocess(face, prompts, [picture] * count, **options)


def test_a_processor_without_a_patch_size_is_named(face, picture, monkeypatch):
    processor = face.processor()
    monkeypatch.setattr(processor, "patch_size", None)
    with pytest.raises(UsageError, match="gives its LlavaProcessor no patch_size"):
        face._hooks.preprocess(processor, Request(prompts=["<image>"], images=[picture]))


def test_the_example_without_a_chat_template_has_a_place_for_its_image(face, monkeypatch):
    processor = face.processor()
    monkeypatch.setattr(processor, "chat_template", None)
    request = load_flow("image-text-to-text").example_request(
        SimpleNamespace(settings={}), processor, None
    )
    tensors = face._hooks.preprocess(processor, request)
    assert tensors["pixel_values"].shape[0] == 1
    assert (tensors["input_ids"] == processor.image_token_id).sum() == 16


def test_images_for_a_checkpoint_with_nothing_but_a_tokenizer(face, picture):
    with pytest.raises(UsageError, match="torchvision"):
        face._hooks.preprocess(
            face.processor().tokenizer, Request(prompts=["<image>"], images=[picture])
        )


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "no input_ids"),
        ({"input_ids": [[1.5, 2.0]]}, "float32 of shape"),
        ({"input_ids": [[[1]]]}, r"shape \[1, 1, 1\]"),
        ({"input_ids": [[]]}, "of shape"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is no tensor"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask has shape"),
        ({"input_ids": [[1]], "pixel_values": "a picture"}, "'pixel_values' is no tensor"),
    ],
)
def test_inputs_that_no_processor_gave(face, inputs, reason):
    with pytest.raises(UsageError, match=reason):
        face._hooks.preprocess(None, Request(inputs=inputs))


def test_inputs_may_be_lists_without_a_batch(face):
    given = face._hooks.preprocess(None, Request(inputs={"input_ids": [1, 2], "other": None}))
    assert given["input_ids"].tolist() == [[1, 2]]
    assert set(given) == {"input_ids"}


def test_prompts_and_inputs_together_are_refused(face, picture):
    with pytest.raises(UsageError, match="either prompts or inputs"):
        face.generate()
    with pytest.raises(UsageError, match="inputs are a list"):
        face.generate(inputs=[1, 2])
    with pytest.raises(UsageError, match="images go with prompts"):
        face.generate(inputs={"input_ids": torch.ones(1, 2)}, images=picture)
    with pytest.raises(UsageError, match="say the same"):
        face.generate(prompts="w1", generation_len=1, max_new_tokens=1)
