"""What the text package adds to the core, through its entry points as users get it."""

from __future__ import annotations

import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from qeff_proxy.errors import UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.sites import Site
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
)

PACKAGE = Path(__file__).parents[1]
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FAMILIES = PROJECT["entry-points"]["qeff_proxy.families"]
WORDS = ["<eos>", "<pad>", "the", "cat", "sat", "down"]


@pytest.fixture
def gpt2():
    return Plugins.discover({}).hooks_for("gpt2")


@pytest.fixture
def tokenizer():
    """A word-level tokenizer that, like GPT2's, has an end-of-sequence token and no pad token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(kind):
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    with torch.device("meta"):
        return kind(config)


# Families


def test_the_families_of_the_package_are_installed():
    found = {
        family.name: family.value
        for family in Plugins.discover({}).families()
        if family.distribution == "qeff-proxy-text"
    }
    assert found == FAMILIES


def test_every_family_is_a_causal_lm_of_transformers():
    known = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    assert {family for family in FAMILIES if "/" not in family} - known == set()


def test_every_family_is_in_the_readme():
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    assert [family for family in FAMILIES if f"`{family}`" not in readme] == []


def test_every_plugin_of_the_package_can_be_used():
    reports = [
        report
        for report in Plugins.discover({}).check()
        if report.distribution == "qeff-proxy-text"
    ]
    assert {report.state for report in reports} == {"ok"}
    assert {report.plugin for report in reports} == set(FAMILIES.values())


# GPT2


def test_gpt2_is_cut_at_wte_and_at_the_head_and_keeps_its_positions(gpt2):
    model = make_model(GPT2LMHeadModel)
    assert gpt2.plugin == "qeff_proxy_text.causal_lm"
    assert gpt2.locate_embedding(model, model.config) == Site("transformer.wte")
    assert gpt2.locate_lm_head(model, model.config) == Site("lm_head")


def test_gpt2_without_its_head_is_left_to_the_generic_plugin(gpt2):
    model = make_model(GPT2Model)
    assert gpt2.locate_embedding(model, model.config) == Site("wte")


# Text in, text out


@pytest.fixture(params=["gpt2", "llama"])
def hooks(request):
    """The hooks of a family with nothing behind them: what answers is this package."""
    nothing = types.SimpleNamespace(decode=hookimpl(trylast=True)(lambda: None))
    return Plugins.discover({}).hooks_for(request.param, generic=nothing)


def test_one_prompt_becomes_its_ids(hooks, tokenizer):
    tensors = hooks.preprocess(tokenizer, Request(prompts=["the cat sat"]))
    assert sorted(tensors) == ["attention_mask", "input_ids"]
    assert tensors["input_ids"].tolist() == [[2, 3, 4]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1]]
    assert tensors["input_ids"].dtype == tensors["attention_mask"].dtype == torch.int64


def test_shorter_prompts_are_padded_on_the_left_with_the_end_token(hooks, tokenizer):
    tensors = hooks.preprocess(tokenizer, Request(prompts=["the cat sat", "down"]))
    assert tensors["input_ids"].tolist() == [[2, 3, 4], [0, 0, 5]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_pad_token_pads_where_there_is_one(hooks, tokenizer):
    tokenizer.pad_token = "<pad>"
    tensors = hooks.preprocess(tokenizer, Request(prompts=["the cat", "down"]))
    assert tensors["input_ids"].tolist() == [[2, 3], [1, 5]]


def test_the_tokenizers_own_padding_side_is_left_alone(hooks, tokenizer):
    tokenizer.padding_side = "right"
    tensors = hooks.preprocess(tokenizer, Request(prompts=["the cat", "down"]))
    assert tensors["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)


def test_an_empty_prompt_is_an_error(hooks, tokenizer):
    with pytest.raises(UsageError, match="empty"):
        hooks.preprocess(tokenizer, Request(prompts=["the", ""]))


def test_tensors_made_by_the_user_win_over_prompts(gpt2, tokenizer):
    request = Request(prompts=["the cat"], inputs={"input_ids": np.array([[5]])})
    assert gpt2.preprocess(tokenizer, request)["input_ids"].tolist() == [[5]]


def test_prompts_without_a_tokenizer_are_an_error(hooks):
    with pytest.raises(UsageError, match="processor"):
        hooks.preprocess(None, Request(prompts=["the cat"]))


@pytest.mark.parametrize("convert", [np.array, torch.tensor, list], ids=["numpy", "torch", "list"])
def test_new_tokens_become_texts_without_special_tokens(hooks, tokenizer, convert):
    outputs = {"generated_ids": [convert([2, 3, 0]), convert([5])]}
    assert hooks.decode(tokenizer, outputs) == ["the cat", "down"]


def test_without_a_tokenizer_there_is_no_text(hooks):
    assert hooks.decode(None, {"generated_ids": [np.array([2, 3])]}) is None
