"""Checkpoints that bring their own code: loaded, cut and run, only where that code is trusted.

The code in ``code/`` was written for these tests, with the module structure and the habits of
InternVL's and Molmo's own. To run the tests of InternVL on the real code, put its files into a
folder (the hub's flat layout), and name it: ``QEFF_PROXY_INTERNVL_CODE=folder pytest …``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qeff_proxy import Plugins, QEFFAutoModelForCausalLM, Request
from qeff_proxy.backends.compile_export import open_sessions
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import CheckpointError, CutError, UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.load.load_model import load_config, load_model
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy_vision.molmo import Loader
from qeff_proxy_vision.molmo import preprocess as preprocess_molmo
from qeff_proxy_vision.remote import (
    DROP_PATH,
    adapted,
    import_class,
    load_adapted_config,
    standing_in,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CODE = Path(__file__).parent / "code"
TOLERANCE = 1e-4
NEW_TOKENS = 16
SPECIAL = ["<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
INTERNVL = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 28,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 4,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 107,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "qk_normalization": False,
        "qkv_bias": True,
        "use_flash_attn": False,
    },
}
INTERNLM2 = {
    **INTERNVL["llm_config"],
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "rope_theta": 10000.0,
}
MOLMO = {
    "model_type": "molmo",
    "architectures": ["MolmoForCausalLM"],
    "auto_map": {
        "AutoConfig": "config_molmo.MolmoConfig",
        "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
    },
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def modules_of_their_own(tmp_path, monkeypatch):
    """Imported code is copied below ``tmp_path`` and forgotten afterwards."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def write_checkpoint(folder, code, config):
    """Code, config, and random weights, norms and biases included."""
    shutil.copytree(code, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.json").write_text(json.dumps(config))
    auto_map = config["auto_map"]
    loaded = load_adapted_config(folder, auto_map["AutoConfig"], DROP_PATH)
    cls = adapted(import_class(folder, auto_map["AutoModelForCausalLM"], DROP_PATH))
    with standing_in(DROP_PATH):
        model = cls(loaded)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        weights[name] = (
            value + noise * 0.3 if value.dim() == 1 else noise * 1.5 / value.shape[-1] ** 0.5
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def internvl(tmp_path):
    return make_internvl(tmp_path / "internvl", INTERNVL)


def make_internvl(folder, config):
    code = Path(os.environ.get("QEFF_PROXY_INTERNVL_CODE") or CODE / "internvl_chat")
    write_checkpoint(folder, code, config)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer():
    words = [*SPECIAL, *(f"w{i}" for i in range(100))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:],
        chat_template="{% for m in messages %}<|im_start|> {{ m['content'] }} <|im_end|>"
        "{% endfor %}",
    )


@pytest.fixture
def molmo(tmp_path):
    return write_checkpoint(tmp_path / "molmo", CODE / "molmo", MOLMO)


class Steps:
    def __init__(self):
        self.logits = []

    def step(self, phase, index, part, inputs, outputs, *, past_length):
        if part == "lm_head":
            self.logits.append(outputs["logits"][:, -1])


def greedy_steps(compiled, sessions, prompt):
    steps = Steps()
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    job = Job(
        export=compiled.export,
        sessions=sessions,
        options=compiled.options,
        config=load_config(compiled.export.processor_folder),
        tensors=prompt,
        folder=compiled.export.folder / "none",
        settings=settings,
        recorder=steps,
    )
    tokens = load_flow("image-text-to-text").run(job)["generated_ids"]
    return tokens, np.stack(steps.logits[-NEW_TOKENS:], axis=1)


def check_parity(face, prompts, folder):
    """The graphs' greedy tokens and logits are those of the uncut model, and it varies."""
    face.export(folder)
    face.compile()
    loaded = face._loaded
    sites = [
        getattr(face._hooks, f"locate_{name}")(loaded.model, loaded.model.config)
        for name in ("embedding", "lm_head")
    ]
    proxy = face._hooks.build_proxy(loaded.model, *sites, "split")
    seen = set()
    with open_sessions(face._compiled) as sessions:
        for prompt in prompts:
            tokens, logits = greedy_steps(face._compiled, sessions, prompt)
            tensors = {name: value.numpy() for name, value in prompt.items()}
            expected = proxy.reference(loaded.model, tensors, tokens[:, :-1])[:, -NEW_TOKENS:]
            assert np.abs(logits - expected).max() <= TOLERANCE
            assert (expected.argmax(-1) == tokens).all()
            seen |= set(tokens.flatten().tolist())
    assert len(seen) > 8


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the real code, which is old
@pytest.mark.parametrize("language", ["qwen2", "internlm2"])
def test_internvls_own_code_gives_what_the_uncut_model_gives(language, tmp_path):
    config = INTERNVL if language == "qwen2" else {**INTERNVL, "llm_config": INTERNLM2}
    internvl = make_internvl(tmp_path / "internvl", config)
    face = QEFFAutoModelForCausalLM.from_pretrained(
        internvl, kv_offload=True, enable_proxy=True, trust_remote_code=True
    )
    tokenizer = face.processor()
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)

    def prompt(prompts, images):
        return face._hooks.preprocess(tokenizer, Request(prompts=prompts, images=images))

    one = prompt(["w1 w5"], [image])
    assert (one["input_ids"] == SPECIAL.index("<IMG_CONTEXT>")).sum() == 4 * len(
        one["pixel_values"]
    )
    prompts = [
        one,
        prompt(["w1 <image> w2 <image> w3"], [image, image[:30, :30]]),
        prompt(["w7 w8"], []),
        prompt(["w1 w2 w3 w4", "w9 <image>"], [[], [image]]),
    ]
    check_parity(face, prompts, tmp_path / "export")
    result = face.generate(inputs=one, tokenizer=tokenizer, generation_len=4, write_io=True)
    assert result.generated_ids.shape == (1, 4)
    assert result.generated_texts[0].startswith("w")
    assert result.io_folder.is_dir()
    with pytest.raises(UsageError, match=r"2 image tokens .* and 1 image\."):
        prompt(["<image> <image>"], [image])


def test_molmos_own_code_gives_what_the_uncut_model_gives(molmo, tmp_path):
    face = QEFFAutoModelForCausalLM.from_pretrained(
        molmo, kv_offload=True, enable_proxy=True, trust_remote_code=True
    )
    assert face.model.get_input_embeddings()(torch.tensor([[130]])).shape == (1, 1, 64)
    generator = torch.Generator().manual_seed(0)

    def row(crops, length):
        """What the checkpoint's ``process`` gives."""
        values = {"input_ids": torch.randint(1, 128, (length,), generator=generator)}
        if crops:
            places = torch.randperm(length, generator=generator)[: crops * 4].reshape(crops, 4)
            places[0, 1] = -1
            values["images"] = torch.rand(crops, 16, 147, generator=generator)
            values["image_masks"] = torch.randint(0, 2, (crops, 16), generator=generator).float()
            values["image_input_idx"] = places
        return values

    class Processor:
        def __init__(self, rows):
            self.rows = iter(rows)

        def process(self, images, text):
            return next(self.rows)

    def batch(*rows):
        request = Request(prompts=["w"] * len(rows), images=[[] for _ in rows])
        return preprocess_molmo(Processor(rows), request)

    prompts = [
        batch(row(2, 20)),
        batch(row(4, 25)),
        batch(row(0, 9)),
        batch(row(2, 20), row(1, 12), row(0, 7)),
    ]
    check_parity(face, prompts, tmp_path / "export")
    own = preprocess_molmo(None, replace(Request(), inputs=row(2, 20)))
    assert own["input_ids"].shape == (1, 20)
    assert own["images"].shape == (1, 2, 16, 147)
    inputs = {name: value[None] for name, value in row(2, 20).items()}
    answer = face.generate(inputs=inputs, generation_len=8).generated_ids
    blind = {**inputs, "images": inputs["images"] * 0}
    assert face.generate(inputs=blind, generation_len=8).generated_ids.tolist() != answer.tolist()
    inputs["pixel_values"] = inputs.pop("images")  # as QEfficient's scripts do
    inputs["valid_idx"] = torch.nonzero(inputs["image_input_idx"].reshape(1, -1) > 0)[:, 1][None]
    assert face.generate(inputs=inputs, generation_len=8).generated_ids.tolist() == answer.tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the real code, which is old
@pytest.mark.parametrize("kind", ["internvl", "internlm2", "molmo"])
def test_a_fault_fails(kind, fault, tmp_path):
    if kind == "molmo":
        folder = write_checkpoint(tmp_path / "molmo", CODE / "molmo", MOLMO)
    else:
        config = INTERNVL if kind == "internvl" else {**INTERNVL, "llm_config": INTERNLM2}
        folder = make_internvl(tmp_path / "internvl", config)
    loaded = load_model(str(folder), trust_remote_code=True)
    made = cut_model(loaded, Plugins.discover().hooks_for(loaded.model_type), "split")
    with pytest.raises(CutError, match="do not equal the uncut model"):
        load_flow(made.proxy.flow).verify(loaded.model, fault(made.proxy), made.sites)


def test_a_language_model_that_is_not_known_is_refused(internvl):
    loaded = load_model(str(internvl), trust_remote_code=True)
    other = type("Phi3ForCausalLM", (type(loaded.model.language_model),), {"__module__": "code"})
    loaded.model.language_model.__class__ = other
    with pytest.raises(
        UnsupportedModelError, match="language model in the checkpoint's code, Phi3"
    ):
        cut_model(loaded, Plugins.discover().hooks_for(loaded.model_type), "split")


def with_processor(molmo):
    make_tokenizer().save_pretrained(molmo)
    settings = {
        "processor_class": "MolmoProcessor",
        "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"},
    }
    (molmo / "preprocessor_config.json").write_text(json.dumps(settings))
    return molmo


def test_an_export_brings_the_code_of_its_processor(molmo, tmp_path):
    loaded = load_model(str(with_processor(molmo)), trust_remote_code=True)
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    export = export_model(loaded, hooks, output=tmp_path / "export")
    shutil.rmtree(molmo)
    processor = load_processor(export.processor_folder, trust_remote_code=True)
    request = Request(prompts=["w1 w2"], images=[[np.zeros((56, 56, 3), np.uint8)]])
    assert preprocess_molmo(processor, request)["images"].shape == (1, 1, 16, 147)


def test_molmos_own_processor_runs_without_what_it_imports(molmo):
    processor = load_processor(with_processor(molmo), trust_remote_code=True)
    left = np.zeros((56, 56, 3), np.uint8)
    left[:, :28] = 255

    def prepared(*images):
        request = Request(prompts=["w1 w2"], images=[list(images)])
        return preprocess_molmo(processor, request)

    text = prepared()["input_ids"].tolist()[0]
    assert len(text) == 5
    one = prepared(left)
    assert one["images"].shape == (1, 1, 16, 147)
    assert one["images"][0, 0, 0].mean() > 0.95
    assert one["images"][0, 0, 3].mean() < 0.05
    two = prepared(left, left[::-1, ::-1])
    ids = two["input_ids"][0].tolist()
    assert ids[-4:] == text[-4:]
    assert [ids[place] for place in two["image_input_idx"][0].flatten()] == [126] * 8
    assert len(set(two["image_input_idx"].flatten().tolist())) == 8
    assert two["images"][0, 1, 3].mean() > 0.95
    assert not {"tensorflow", "torchvision"} & set(sys.modules)


def test_a_processor_that_is_not_named_or_not_there(molmo):
    assert Loader.load_processor(molmo) is None
    (molmo / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no processor"):
        Loader.load_processor(molmo)


def test_code_that_is_not_trusted_is_not_run(internvl, molmo):
    for folder in (internvl, molmo):
        with pytest.raises(CheckpointError, match="brings its own Python code"):
            load_model(str(folder))


def test_nothing_is_left_of_what_was_stood_in_for(internvl):
    before = set(sys.modules)
    loaded = load_model(
        str(internvl), auto_class="AutoModelForImageTextToText", trust_remote_code=True
    )
    assert loaded.model.img_context_token_id == SPECIAL.index("<IMG_CONTEXT>")
    left = set(sys.modules) - before
    assert not [name for name in left if name.startswith("timm")]


def test_a_package_that_is_there_is_not_stood_in_for():
    with standing_in({"json.none": {}, "no_such_package.inner": {"value": 1}}):
        assert "json.none" not in sys.modules
        from no_such_package.inner import value
    assert value == 1
    assert not [name for name in sys.modules if name.startswith("no_such_package")]


def test_code_that_needs_a_missing_package_says_which(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "modeling.py").write_text("import no_such_package\nclass Model: ...\n")
    with pytest.raises(CheckpointError, match="no_such_package"):
        import_class(folder, "modeling.Model", {})
