"""Exported graphs in ONNX Runtime give what the uncut model gives, for every family.

Logits of each of 16 greedy steps must lie within `TOLERANCE` of the model's own, and tokens must
be the same, with one image, two, none, and in batches padded on the left, with the prompt at once
and in chunks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForImageTextToText
from qeff_proxy.backends.compile_export import open_sessions
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from qeff_proxy_vision.tiny import FAMILIES

pytestmark = pytest.mark.one_home

# Logits go up to 6. In float32 the models themselves are up to 5e-5 from what they give in float64,
# depending on threads, and so are the graphs.
TOLERANCE = 2e-4

NEW_TOKENS = 16
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Images in each row of the batch.
PROMPTS = {
    "one image": [1],
    "two images": [2],
    "no image": [0],
    "padded batch, one row without an image": [0, 1, 1],
    "padded batch, two images and one": [2, 1],
}


class Steps:
    """Keeps the logits of the last position of each step, and counts runs of the vision part."""

    def __init__(self):
        self.logits = []
        self.vision_runs = 0

    def step(self, phase, index, part, inputs, outputs, *, past_length):
        self.vision_runs += part == "vision"
        if part == "lm_head":
            self.logits.append(outputs["logits"][:, -1])


class Wrapped:
    """A session whose outputs something is done to."""

    def __init__(self, session, change):
        self.session = session
        self.change = change

    def run(self, feeds):
        return self.change(self.session.run(feeds))


def shift_by_one(outputs):
    return {
        name: np.roll(value.reshape(-1, value.shape[-1]), 1, axis=0).reshape(value.shape)
        for name, value in outputs.items()
    }


def expected(model, prompt):
    with torch.no_grad():
        output = model.generate(
            **prompt, **GREEDY, output_logits=True, return_dict_in_generate=True
        )
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :]
    return tokens.numpy(), np.stack([step.numpy() for step in output.logits])


def actual(face, sessions, compiled, prompt, steps=None):
    steps = steps or Steps()
    job = Job(
        export=compiled.export,
        sessions=sessions,
        options=compiled.options,
        config=face.model.config,
        tensors=prompt,
        folder=compiled.export.folder / "none",
        settings=GREEDY,
        recorder=steps,
    )
    tokens = load_flow("image-text-to-text").run(job)["generated_ids"]
    return tokens, np.stack(steps.logits[-NEW_TOKENS:]), steps.vision_runs


def compile_face(model, folder, kind="split", **options):
    """From a checkpoint on disk, as users have it: its weights need not all be loaded."""
    model.save_pretrained(folder / "checkpoint")
    face = QEFFAutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", proxy=kind, **options
    )
    face.export(folder / "export")
    face.compile()
    return face, face._compiled


@pytest.fixture(scope="module", params=FAMILIES)
def split(request, make_model, tmp_path_factory):
    """A family's name, its face and what was compiled: exported once for all tests of it."""
    return request.param, *compile_face(make_model(request.param), tmp_path_factory.mktemp("split"))


def test_graphs_give_what_the_uncut_model_gives(split, prompt_for):
    family, face, compiled = split
    # A chunk shorter than an image: tokens that see each other must still run together.
    in_chunks = replace(compiled, options=replace(compiled.options, prefill_seq_len=7))
    seen = set()
    with open_sessions(compiled) as sessions:
        for name, images_per_row in PROMPTS.items():
            prompt = prompt_for(family, images_per_row)
            tokens, logits = expected(face.model, prompt)
            for run in (compiled, in_chunks):
                got, got_logits, vision_runs = actual(face, sessions, run, prompt)
                assert np.abs(got_logits - logits).max() <= TOLERANCE, name
                assert (got == tokens).all(), name
                assert vision_runs == (1 if sum(images_per_row) else 0), name
            seen |= set(tokens.flatten().tolist())
        # And a fault does not pass: features one row further on.
        shifted = {**sessions, "vision": Wrapped(sessions["vision"], shift_by_one)}
        prompt = prompt_for(family, [1])
        _, logits = expected(face.model, prompt)
        _, got_logits, _ = actual(face, shifted, compiled, prompt)
        assert np.abs(got_logits[0] - logits[0]).max() > 100 * TOLERANCE
    assert len(seen) > 8, "the model repeats itself, so that equal tokens say little"


def test_verify_chooses_an_input_with_an_image_and_openvino_passes(split):
    """These checkpoints have no processor: noise stands among random tokens."""
    _, _, compiled = split
    found = verify_model(compiled.export, ["openvino"], options=VerifyOptions(max_new_tokens=2))
    (result,) = found.results
    assert result.passed, result.error or result.comparison.first_divergence
    assert result.equal_tokens == result.tokens == 4  # two rows, the first without an image
    assert "pixel_values" in found.input
    assert any(str(one.name).startswith("vision.out.") for one in result.comparison.tensors)


class Logits(Steps):
    """As `Steps`, of a model that is one graph."""

    def step(self, phase, index, part, inputs, outputs, *, past_length):
        if "logits" in outputs:
            self.logits.append(outputs["logits"][:, -1])
        if "pixel_values" in inputs:
            self.vision_runs += inputs["pixel_values"].shape[0] > 0


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [("molmo2", "split", {"kv_offload": False}), ("gemma3", "whole", {})],
    ids=["vision in the body", "everything in one graph"],
)
def test_one_graph_gives_the_same_and_sees_images_once(
    family, kind, options, make_model, prompt_for, tmp_path
):
    face, compiled = compile_face(make_model(family), tmp_path, kind, **options)
    in_chunks = replace(compiled, options=replace(compiled.options, prefill_seq_len=7))
    with open_sessions(compiled) as sessions:
        for name, images_per_row in PROMPTS.items():
            prompt = prompt_for(family, images_per_row)
            tokens, logits = expected(face.model, prompt)
            for run in (compiled, in_chunks):
                got, got_logits, vision_runs = actual(face, sessions, run, prompt, Logits())
                assert np.abs(got_logits - logits).max() <= TOLERANCE, name
                assert (got == tokens).all(), name
                assert vision_runs == (1 if sum(images_per_row) else 0), name
