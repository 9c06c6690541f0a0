"""The tiny GPT-2 that ships with the core: small, whole, and good at its one job."""

import re
import socket
from itertools import islice

import pytest
import torch
from measure_tiny_gpt2 import continue_text, losses_and_margins
from stories import Grammar
from train_tiny_gpt2 import (
    END,
    HELD_OUT_SEED,
    OUTPUT,
    PAD,
    batches,
    new_model,
    tell,
    train,
    train_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
PROMPT = "Anna went to the market"


@pytest.fixture(scope="module")
def grammar():
    return Grammar()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(OUTPUT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(OUTPUT).eval()


@pytest.fixture(scope="module")
def held_out(grammar):
    return list(islice(tell(grammar, HELD_OUT_SEED), 60))


@pytest.fixture(scope="module")
def scores(model, tokenizer, held_out):
    return losses_and_margins(model, tokenizer, [story.text for story in held_out])


def test_the_folder_holds_what_it_needs_and_is_small():
    assert {path.name for path in OUTPUT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in OUTPUT.iterdir()) < 2_000_000


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = AutoModelForCausalLM.from_pretrained(OUTPUT)
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    assert isinstance(model, GPT2LMHeadModel)
    assert model.config.model_type == "gpt2"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token == PAD
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    "text",
    [
        PROMPT,
        " a space before,  two within, one after ",
        "line\nfeed\r\nand\ttab",
        "I 'm here , don't ! it 's 3.14 ?",
        "naïve 東京 🙂",
        "Hi there!!",
    ],
)
def test_the_tokenizer_gives_every_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_perplexity_is_close_to_that_of_the_grammar(scores, held_out):
    losses, _ = scores
    floor = sum(story.nats for story in held_out) / len(losses)
    assert losses.mean().item() < floor + 0.02


def test_its_choices_are_clear(scores):
    _, margins = scores
    assert margins.median() > 7
    assert margins.quantile(0.1) > 0.3


def test_a_greedy_continuation_is_a_story(model, tokenizer, grammar):
    [(text, ended)] = continue_text(model, tokenizer, [PROMPT])
    assert ended
    assert text.startswith(PROMPT)
    assert len(tokenizer.encode(text)) - len(tokenizer.encode(PROMPT)) >= 60
    assert grammar.strange_sentences(text) == []
    assert grammar.is_story(text)


def test_most_continuations_are_stories(model, tokenizer, grammar, held_out):
    prompts = [" ".join(story.text.split()[:5]) for story in held_out]
    texts = continue_text(model, tokenizer, prompts)
    assert all(ended for _, ended in texts)
    assert sum(not grammar.strange_sentences(text) for text, _ in texts) >= 0.95 * len(texts)
    assert sum(grammar.is_story(text) for text, _ in texts) >= 0.8 * len(texts)


def test_it_tells_the_same_again_alone_and_beside_others(model, tokenizer):
    prompts = [PROMPT, "My name is", "Once upon a time there was a boy named"]
    together = continue_text(model, tokenizer, prompts)
    assert together == continue_text(model, tokenizer, prompts)
    assert together == [continue_text(model, tokenizer, [prompt])[0] for prompt in prompts]


def test_sampling_ends_too(model, tokenizer):
    torch.manual_seed(3)
    assert all(ended for _, ended in continue_text(model, tokenizer, [PROMPT] * 8, sample=True))


def test_the_card_says_what_is_true(model, scores):
    card = (OUTPUT / "README.md").read_text(encoding="utf-8")
    assert f"| Parameters | {model.num_parameters():,} |" in card
    assert "license: apache-2.0" in card
    [perplexity] = re.findall(r"\| Perplexity per token \(loss\) \| ([\d.]+)", card)
    losses, _ = scores
    assert losses.mean().exp().item() == pytest.approx(float(perplexity), rel=0.02)


def test_the_script_makes_this_tokenizer(grammar, tmp_path):
    train_tokenizer(grammar).save_pretrained(tmp_path)
    made = (tmp_path / "tokenizer.json").read_bytes()
    assert made == (OUTPUT / "tokenizer.json").read_bytes()


def test_training_is_deterministic(grammar, tokenizer):
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        fresh = new_model(tokenizer)
        train(fresh, batches(grammar, tokenizer, set()), steps=2)
        weights.append(fresh.transformer.wte.weight.detach().clone())
    assert torch.equal(*weights)
