"""In Python, an argument of the wrong kind is one clear line, with nothing of a library inside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.registry import list_backends, load_backend
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CheckpointError, UsageError
from transformers import AutoTokenizer, GPT2TokenizerFast

pytestmark = pytest.mark.one_home

IDS = [[34, 451, 342, 270]]
GOES_ON = [[263, 718, 15]]


@pytest.fixture(scope="module")
def face(demo_checkpoint: Path, demo_export: Path) -> Any:
    """A face on the export that tests share."""
    model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, proxy="split")
    model._export = read_export(demo_export)
    return model


def generate(face: Any, inputs: Any = None, **settings: Any) -> Any:
    """Three greedy tokens, unless the settings say otherwise."""
    given = {} if "prompts" in settings else {"inputs": {"input_ids": IDS, **(inputs or {})}}
    result = face.generate(**{**given, "max_new_tokens": 3, "do_sample": False, **settings})
    return result.generated_ids.tolist()


def refused(function: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["position_ids", "foo", "labels", "token_type_ids"])
def test_an_input_that_nothing_uses_is_named(name: str, face: Any) -> None:
    message = refused(generate, face, {name: [[50, 51, 52, 53]]})
    assert f"nothing uses the input {name!r}" in message


def test_what_a_tokenizer_gives_passes(face: Any, demo_checkpoint: Path) -> None:
    made = AutoTokenizer.from_pretrained(demo_checkpoint)("Anna went to", return_tensors="pt")
    made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    made["labels"] = None
    assert face.generate(inputs=made, max_new_tokens=3).generated_ids.shape == (1, 3)


def test_a_token_beyond_the_table_may_be_an_added_one(face: Any) -> None:
    message = refused(generate, face, {"input_ids": [[5, 10**6]]})
    assert "1000000 is no token of this model" in message
    assert "if that has added tokens, resize the model's embedding" in message


@pytest.mark.parametrize("name", ["speech.wav", "photo"])
def test_the_path_of_a_sound_or_an_image_is_no_prompt(name: str, face: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG")
    path = str(tmp_path / name)
    assert "is a sound, image or video file" in refused(
        generate, face, prompts=["Anna went to", path]
    )


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_a_mask_may_be_of_any_kind_of_number(kind: Any, face: Any) -> None:
    assert generate(face, {"attention_mask": np.ones((1, 4), kind)}) == GOES_ON
    assert "must hold 0 and 1" in refused(
        generate, face, {"attention_mask": np.array([[1, 1, 1, 0]], kind)}
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({3: IDS}, "an input is called 3"),
        ({"input_ids": 5}, "input_ids has shape []"),
        ({"input_ids": [[True, False]]}, "input_ids are bool"),
        ({"input_ids": [[1j]]}, "input_ids are complex64"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, "on the meta device"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.int64).to_sparse()}, "sparse"),
        ({"attention_mask": torch.ones(1, 4, device="meta")}, "on the meta device"),
    ],
)
def test_inputs_of_the_wrong_kind(inputs: Any, words: str, face: Any) -> None:
    assert words in refused(generate, face, inputs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": 5}, "prompts is 5"),
        ({"prompts": ["a", 5]}, "prompts has 5"),
        ({"prompts": b"x"}, "prompts is b'x'"),
        ({"prompts": ["x"], "tokenizer": "x"}, "tokenizer is 'x', which is no tokenizer"),
        ({"prompts": ["x"], "tokenizer": 3}, "tokenizer is 3"),
        ({"prompts": ["x"], "tokenizer": GPT2TokenizerFast}, "the class GPT2Tokenizer"),
        ({"prompts": ["x"], "tokenizer": torch.nn.Linear(2, 2)}, "tokenizer is a Linear"),
        ({"max_length": "9"}, "max_length is '9'"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"generation_len": 1.5, "max_new_tokens": None}, "max_new_tokens is 1.5"),
        ({"num_beams": [2]}, "num_beams is [2]"),
        ({"stop_strings": [3]}, "stop_strings has 3"),
        ({"stop_strings": 3}, "stop_strings is 3"),
        ({"streamer": "x"}, "streamer is a str"),
        ({"io_steps": 3}, "io_steps is 3"),
        ({"io_steps": None}, "io_steps is None"),
        ({"io_steps": [1]}, "io_steps is [1]"),
        ({"io_tensors": 3}, "io_tensors is 3"),
        ({"io_tensors": [3]}, "io_tensors has 3"),
        ({"io_dir": 3}, "io_dir is 3"),
        ({"io_dir": b"x"}, "io_dir is b'x'"),
        ({"io_dir": ["a"]}, "io_dir is ['a']"),
        ({"write_io": "x"}, "write_io is 'x'"),
        ({"generation_config": 3}, "generation_config is an int"),
        ({"logits_processor": [3]}, "logits_processor is [3]"),
        ({"forced_eos_token_id": 10**9}, "forced_eos_token_id is 1000000000"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"do_sample": "maybe"}, "do_sample is 'maybe'"),
        ({"top_p": 5}, "It must be a number from 0 to 1"),
        ({"top_k": "x"}, "top_k is 'x'"),
    ],
)
def test_arguments_of_generate(settings: Any, words: str, face: Any) -> None:
    assert words in refused(generate, face, **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": ["a"]}, "backend is ['a']"),
        ({"seq_len": 1.5}, "a length of seq_len is 1.5"),
        ({"seq_len": [True]}, "a length of seq_len is True"),
        ({"batch_size": None}, "batch_size is None"),
        ({"optimization": ["all"]}, "optimization is ['all']"),
        ({"save_optimized": 1}, "save_optimized is 1"),
    ],
)
def test_arguments_of_compile(options: Any, words: str, face: Any) -> None:
    assert words in refused(face.compile, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"export_dir": 3}, "export_dir is 3"),
        ({"export_dir": b"x"}, "export_dir is b'x'"),
        ({"taps": 3}, "taps is 3"),
        ({"taps": [3]}, "taps has 3"),
        ({"num_layers": 1.5}, "the number of layers is 1.5"),
        ({"num_layers": True}, "the number of layers is True"),
        ({"num_layers": [1]}, "the number of layers is [1]"),
        ({"opset": "18"}, "opset is '18'"),
    ],
)
def test_arguments_of_export(options: Any, words: str, face: Any) -> None:
    assert words in refused(face.export, **options)


@pytest.mark.parametrize("model", [3, None, "x", torch.nn.Linear(2, 2)])
def test_what_is_no_model(model: Any) -> None:
    assert "is no transformers model" in refused(QEFFAutoModelForCausalLM, model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plugins": 3}, "plugins are an int"),
        ({"proxy": ""}, "proxy is ''"),
    ],
)
def test_arguments_of_from_pretrained(options: Any, words: str, demo_checkpoint: Path) -> None:
    load = QEFFAutoModelForCausalLM.from_pretrained
    assert words in refused(load, demo_checkpoint, **options)
    assert "hub id is 3" in refused(load, 3)


def test_one_glob_is_no_list_of_letters(face: Any, tmp_path: Path) -> None:
    generate(face, io_dir=tmp_path / "io", io_tensors="*.logits")
    assert read_dump(tmp_path / "io").names() == ["lm_head.out.logits"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_says_what_each_of_its_options_takes(backend: str) -> None:
    assert backend in {report.name for report in list_backends()}
    implementation = load_backend(backend)
    assert set(implementation.values) == set(implementation.options)


@pytest.fixture(scope="module")
def own_export(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose generation settings a test may change."""
    folder = tmp_path_factory.mktemp("own") / "export"
    shutil.copytree(demo_export, folder, ignore=shutil.ignore_patterns("io"))
    return folder


@pytest.fixture
def with_settings(own_export: Path, demo_checkpoint: Path) -> Any:
    """A function that writes ``generation_config.json`` and gives a face on the export."""
    model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, proxy="split")
    model._export = read_export(own_export)
    path = own_export / "processor" / "generation_config.json"
    before = path.read_text()

    def write(settings: Any) -> Any:
        whole = settings if isinstance(settings, str) else json.dumps(settings)
        path.write_text(whole)
        return model

    yield write
    path.write_text(before)


@pytest.mark.parametrize(
    "settings",
    [
        *("garbage", "[]", "null", "3"),
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"max_new_tokens": "x"},
        {"max_new_tokens": 1.5},
        {"num_beams": 0},
        {"num_return_sequences": 3},
        {"cache_implementation": "nope"},
        {"prompt_lookup_num_tokens": 1},
        {"eos_token_id": "x"},
        {"forced_eos_token_id": 10**9},
    ],
)
def test_generation_settings_of_a_checkpoint_that_cannot_be_right(
    settings: Any, with_settings: Any
) -> None:
    face = with_settings(settings)
    with pytest.raises(CheckpointError, match="json cannot be used: ") as caught:
        face.generate(inputs={"input_ids": IDS})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"output_scores": True, "use_cache": False},
    ],
)
def test_settings_that_change_no_token_change_nothing(settings: Any, with_settings: Any) -> None:
    assert generate(with_settings(settings)) == GOES_ON


def test_stop_strings_of_a_checkpoint_stop(with_settings: Any) -> None:
    face = with_settings({"max_new_tokens": 40, "stop_strings": ["."]})
    text = face.generate(prompts=["Anna went to the market"]).generated_texts[0]
    assert text.endswith(".")
    assert text.count(".") == 1
