"""Exported graphs of a model that no plugin is written for, against transformers' generation.

Qwen3-VL, five layers of text and three of a tower with random weights: grids, positions of several
axes, features for layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.backends.compile_export import open_sessions
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.export.trace.trace_part import trace_part
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.parts import Part, TensorSpec
from qeff_proxy_vision.fixed_image import FixedImagePart
from qeff_proxy_vision.tiny import with_random_weights

FLOW = "image-text-to-text"
IMAGE_TOKEN, OTHER_TOKEN, PLAIN_TOKENS = 98, 97, 90
NEW_TOKENS = 10
TOLERANCE = 2e-4
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIG = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 4,
        "patch_size": 8,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 2],
    },
    "text_config": {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    },
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": OTHER_TOKEN,
}


def make_model():
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING["qwen3_vl"](**CONFIG)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = None
    return with_random_weights(model, 1.5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, exported from a folder."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    make_model().save_pretrained(folder / "checkpoint")
    face = QEFFAutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", enable_proxy=True, image_size="32x64"
    )
    face.export(folder / "export")
    face.compile()
    return face, face._compiled


def make_prompt(images_per_row, grid=(1, 4, 8), seed=3):
    """A batch of prompts, padded on the left, with images of noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[1] * grid[2] // 4

    def text(length):
        return torch.randint(1, PLAIN_TOKENS, (length,), generator=generator).tolist()

    rows = []
    for extra, images in enumerate(images_per_row):
        row = text(4)
        for _ in range(images):
            row += [IMAGE_TOKEN] * tokens + text(2)
        rows.append(row + text(3 + extra))
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    prompt = {"input_ids": ids, "attention_mask": mask}
    if images := sum(images_per_row):
        pixels = torch.randn(images * 4 * tokens, 3 * 2 * 64, generator=generator)
        prompt |= {
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([grid] * images),
        }
    return prompt


class Logits:
    """Keeps the logits of the last position of each step."""

    def __init__(self):
        self.steps = []

    def step(self, phase, index, part, inputs, outputs, *, past_length):
        if part == "lm_head":
            self.steps.append(outputs["logits"][:, -1])


def run(face, compiled, sessions, prompt):
    logits = Logits()
    job = Job(
        export=compiled.export,
        sessions=sessions,
        options=compiled.options,
        config=face.model.config,
        tensors=prompt,
        folder=compiled.export.folder / "none",
        settings=GREEDY,
        recorder=logits,
    )
    tokens = load_flow(FLOW).run(job)["generated_ids"]
    return tokens, np.stack(logits.steps[-NEW_TOKENS:])


def test_graphs_give_what_transformers_generates(exported):
    face, compiled = exported
    in_chunks = replace(compiled, options=replace(compiled.options, prefill_seq_len=7))
    seen = set()
    with open_sessions(compiled) as sessions:
        for images_per_row in ([1], [0], [2], [0, 1], [2, 1]):
            prompt = make_prompt(images_per_row)
            with torch.no_grad():
                output = face.model.generate(
                    **prompt, **GREEDY, output_logits=True, return_dict_in_generate=True
                )
            expected = output.sequences[:, prompt["input_ids"].shape[1] :].numpy()
            logits = np.stack([step.numpy() for step in output.logits])
            for options in (compiled, in_chunks):
                tokens, actual = run(face, options, sessions, prompt)
                assert np.abs(actual - logits).max() <= TOLERANCE, images_per_row
                assert (tokens == expected).all(), images_per_row
            seen |= set(expected.flatten().tolist())
    assert len(seen) > 8, "the model repeats itself, so that equal tokens say little"


def test_a_model_that_has_generated_before_is_exported(tmp_path):
    """It keeps the offsets of its last prompt's positions, a batch of them."""
    model = make_model()
    model.generate(**make_prompt([2, 1]), **GREEDY)
    kept = model.model.rope_deltas
    assert kept is not None
    face = QEFFAutoModelForImageTextToText(model, proxy="split", options={"image_size": "32x64"})
    face.export(tmp_path / "export")
    assert model.model.rope_deltas is kept
    face.compile()
    prompt = make_prompt([1, 1], seed=4)
    expected = model.generate(**prompt, **GREEDY)[:, prompt["input_ids"].shape[1] :]
    result = face.generate(inputs=prompt, generation_len=NEW_TOKENS)
    assert (np.asarray(result.generated_ids) == expected.numpy()).all()


def test_the_layers_are_streamed(exported):
    _, compiled = exported
    assert compiled.export.model["model_type"] == "qwen3_vl"
    (layers,) = [compiled.export.cut["layers"]]
    assert layers["count"] == 5
    assert layers["verified"] < 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda prompt: make_prompt([1], grid=(1, 4, 4)),
            r"image 1 has image_grid_thw \[1, 4, 4\], and the export is made for \[1, 4, 8\]",
        ),
        (
            lambda prompt: {n: v for n, v in prompt.items() if n != "image_grid_thw"},
            "images need the tensor 'image_grid_thw'",
        ),
        (
            lambda prompt: {**prompt, "pixel_values": prompt["pixel_values"][:, :-1]},
            r"pixel_values has shape \[32, 383\], and the export is made for images of",
        ),
        (
            lambda prompt: {**prompt, "pixel_values": prompt["pixel_values"][:-1]},
            "which is not that of 1 images",
        ),
        (
            lambda prompt: {n: v for n, v in prompt.items() if n != "pixel_values"},
            "8 image tokens, and there is no image",
        ),
        (
            lambda prompt: {**prompt, "input_ids": prompt["input_ids"].clamp(max=50)},
            "no image token",
        ),
        (
            lambda prompt: {**prompt, "input_ids": prompt["input_ids"].roll(1).fill_(98)},
            "17 image tokens, and its images need 8",
        ),
    ],
)
def test_images_that_do_not_fit(exported, change, said):
    face, compiled = exported
    with open_sessions(compiled) as sessions, pytest.raises(UsageError, match=said):
        run(face, compiled, sessions, change(make_prompt([1])))


def test_a_tensor_that_would_change_the_features(exported):
    face, compiled = exported
    image = {**compiled.export.settings["image"], "refused": ["pixel_details"]}
    export = replace(compiled.export, settings={**compiled.export.settings, "image": image})
    prompt = {**make_prompt([1]), "pixel_details": torch.ones(1)}
    with open_sessions(compiled) as sessions:
        run(face, compiled, sessions, prompt)  # where no tower takes it, it says nothing
        with pytest.raises(UsageError, match="pixel_details"):
            run(face, replace(compiled, export=export), sessions, prompt)


def test_features_for_a_layer_beyond_the_last_are_refused(tmp_path):
    """They are added after layers 0 and 1, before layers 1 and 2."""
    make_model().save_pretrained(tmp_path / "checkpoint")
    face = QEFFAutoModelForImageTextToText.from_pretrained(
        tmp_path / "checkpoint", enable_proxy=True, image_size="32x64", num_hidden_layers=2
    )
    with pytest.raises(UnsupportedModelError, match=r"into layer 2 .* has 2 layers"):
        face.export(tmp_path / "export")
    assert not (tmp_path / "export").exists()


class Counting(torch.nn.Module):
    """A tower that counts into zeros, as experts count their tokens."""

    def __init__(self):
        super().__init__()
        self.language_model = torch.nn.Identity()

    def features(self, pixel_values):
        places = (pixel_values.flatten() > 0).long()
        counts = torch.zeros(2).scatter_add_(0, places, torch.ones(places.shape))
        return {"pooler_output": pixel_values.reshape(-1, 1) * counts}


def test_counts_in_a_tower_are_no_constants_of_its_graph(tmp_path):
    module = FixedImagePart(Counting(), "language_model", {}, get=Counting.features)
    inputs = (TensorSpec("pixel_values", "float32", (1, 3, 2, 2)),)
    outputs = (TensorSpec("image_features", "float32", (12, 2)),)
    model = trace_part(Part("vision", module, inputs, outputs, "vision"), {}).model
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    for seed in range(3):
        pixels = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        (features,) = session.run(["image_features"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = module(pixel_values=pixels)["image_features"]
        np.testing.assert_allclose(features, expected, rtol=1e-6)
