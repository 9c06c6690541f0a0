"""``verify`` on an encoder and a decoder: layers of both, forced tokens, sounds of several windows.

The Whisper here has random weights, windows of a second, and timestamp tokens.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.backends.torch.backend import TorchBackend
from qeff_proxy.cli import main
from qeff_proxy.compare import compare_dumps
from qeff_proxy.run.example_request import example_request
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from qeff_proxy_audio.sound import EXAMPLE
from transformers import GenerationConfig

pytestmark = pytest.mark.one_home

SHORT = VerifyOptions(max_new_tokens=4)


class ChangedSession:
    """A session whose outputs are changed."""

    def __init__(self, session, change):
        self.session = session
        self.change = change

    def run(self, feeds):
        outputs = {name: np.array(value) for name, value in self.session.run(feeds).items()}
        self.change(outputs)
        return outputs

    def close(self):
        self.session.close()


@pytest.fixture
def backend_that(monkeypatch):
    """Registers a backend that does something to what PyTorch gives for a part."""

    def register(part_name, change):
        class Strange(TorchBackend):
            def open(self, export, part, *others):
                session = super().open(export, part, *others)
                return ChangedSession(session, change) if part.name == part_name else session

        module = ModuleType("strange_backend")
        module.Strange = Strange
        monkeypatch.setitem(sys.modules, "strange_backend", module)
        monkeypatch.setitem(BUILTIN_BACKENDS, "strange", "strange_backend:Strange")
        return "strange"

    return register


@pytest.fixture(scope="module")
def first_run(whisper, processor, tmp_path_factory):
    """The command as people run it, without any input: what it said, and the export."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("whisper")
    checkpoint, export = folder / "checkpoint", folder / "export"
    whisper.save_pretrained(checkpoint)
    GenerationConfig(
        decoder_start_token_id=3, bos_token_id=1, pad_token_id=0, no_timestamps_token_id=148
    ).save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(
            ["verify", str(checkpoint), "--output", str(export), "--max-new-tokens", "4", "--json"]
        )
    assert code == 0
    return json.loads(said.getvalue()), export


def test_the_example_is_cut_to_a_window(first_run):
    found, _ = first_run
    assert found["input"]["audio"] == [[16_000]]  # the recording that comes along is longer
    (result,) = found["backends"]
    assert result["equal_tokens"] == result["tokens"] == 4


def test_layers_of_encoder_and_decoder_are_tapped_and_compared(first_run):
    found, _ = first_run
    comparison = compare_dumps(found["reference"], found["backends"][0]["dump"])
    names = [str(one.name) for one in comparison.tensors]
    for part in ("encoder", "body"):
        assert {f"{part}.out.hidden_states.layer-0{layer}" for layer in (0, 1)} <= set(names)
    assert len(comparison.steps) == 4
    assert comparison.passed


@pytest.mark.parametrize(
    ("part", "layer", "where"),
    [("encoder", 1, "encoder layer 1 in prefill-0000"), ("body", 0, "layer 0 in prefill-0000")],
)
def test_the_first_divergence_says_whose_layer_it_is(
    part, layer, where, first_run, backend_that, capsys
):
    def shift(outputs):
        outputs[f"hidden_states.{layer}"] += 0.5

    backend_that(part, shift)
    given = ["verify", str(first_run[1]), "--backend", "strange", "--max-new-tokens", "2"]
    assert main(given) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"strange FAILED {where} " in out
    assert f"First divergence: layer {layer}, {part}.out.hidden_states.layer-0{layer} in" in out


def test_the_decoder_is_fed_the_references_tokens(first_run, backend_that):
    def negate(outputs):
        outputs["logits"] *= -1

    (result,) = verify_model(first_run[1], [backend_that("lm_head", negate)], options=SHORT).results
    assert (result.equal_tokens, result.tokens) == (0, 4)
    fed = [one for one in result.comparison.tensors if one.name.direction == "in"]
    assert all(one.passed for one in fed)
    assert result.divergence.tensor == "lm_head.out.logits"


def test_a_sound_of_several_windows_is_verified_to_its_end(first_run, capsys, tmp_path):
    samples, rate = soundfile.read(EXAMPLE, dtype="float32")
    soundfile.write(tmp_path / "long.flac", np.tile(samples, 2), rate)
    given = ["--audio", str(tmp_path / "long.flac"), "--backend", "openvino", "--json"]
    assert main(["verify", str(first_run[1]), "--max-new-tokens", "3", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    (result,) = found["backends"]
    assert result["equal_tokens"] == result["tokens"] == found["input"]["new_tokens"] > 6
    assert found["decoded"]["segments"][0][-1]["end"] > 2


def test_without_a_processor_noise_is_the_example(first_run):
    request = example_request(read_export(first_run[1]), None, lambda: None)
    assert request.inputs["input_features"].shape == (1, 16, 100)
    assert not request.audio
