"""Text encoder-decoders on ONNX Runtime, against transformers' own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForSeq2SeqLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.families import generic
from qeff_proxy.load.load_model import flow_of, load_model, wrap_model
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.testing import random_weights
from qeff_proxy.verify.by_layer.verify_layers import verify_layers_of
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy_text import seq2seq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, NEW = 99, 10
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 10,  # heads are not a fraction of the width
    "d_ff": 48,
    "num_layers": 7,  # no fewer than the decoder: transformers makes a cache of so many
    "num_decoder_layers": 5,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 5,
    "decoder_layers": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 24,
    "scale_embedding": True,
    "tie_word_embeddings": False,
    "forced_eos_token_id": None,
}
FEW = dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2)


def shaken(model, seed=1, scale=0.3):
    """Random weights, large enough that the tokens of a text differ."""
    model = random_weights(model, seed)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        table = model.get_decoder().get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=generator) * 0.15)
    return model


def checkpoint(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """Encoder and decoder of different depth, tied; the model, and its proxy from a checkpoint."""
    model = shaken(T5ForConditionalGeneration(T5Config(**T5)))
    folder = checkpoint(model, tmp_path_factory.mktemp("t5"))
    proxy = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder, enable_proxy=True)
    return model, proxy, proxy.export(folder / "export")


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """A decoder deeper than its encoder, an untied head with a bias, forced tokens."""
    model = shaken(BartForConditionalGeneration(BartConfig(**BART)))
    model.final_logits_bias = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(5))
    model.generation_config.forced_bos_token_id = 7
    model.generation_config.forced_eos_token_id = 2
    folder = checkpoint(model, tmp_path_factory.mktemp("bart"))
    proxy = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder, enable_proxy=True)
    return model, proxy, proxy.export(folder / "export")


@pytest.fixture(scope="module")
def texts():
    """Two texts of different length, padded on the right."""
    generator = np.random.default_rng(1)
    ids = generator.integers(3, VOCABULARY, (2, 9))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(model, texts, **settings):
    """The new tokens of transformers' greedy search, and the logits of each step."""
    inputs = {name: torch.from_numpy(array) for name, array in texts.items()}
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=NEW,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    return output.sequences[:, -len(output.logits) :].numpy(), torch.stack(output.logits, 1).numpy()


def check_equal(model, proxy, texts, folder, tolerance=1e-4, **settings):
    tokens, logits = expected(model, texts, **settings)
    assert len(np.unique(tokens)) > 5, "tokens that are all alike prove nothing"
    result = proxy.generate(inputs=texts, generation_len=NEW, io_dir=folder / "io", **settings)
    np.testing.assert_array_equal(result.generated_ids, tokens)
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(tokens.shape[1] - 1))]
    actual = [dump.array(*step, "lm_head.out.logits")[:, -1] for step in steps]
    actual = np.stack(actual, 1).astype(np.float32)
    assert np.abs(actual - logits).max() < tolerance * np.abs(logits).max()
    return tokens


def test_t5_gives_the_tokens_and_logits_of_transformers(t5, texts, tmp_path):
    tokens = check_equal(*t5[:2], texts, tmp_path)
    alone = {name: array[1:, :6] for name, array in texts.items()}
    np.testing.assert_array_equal(expected(t5[0], alone)[0], tokens[1:])


def test_bart_gives_the_tokens_and_logits_of_transformers(bart, texts, tmp_path):
    tokens = check_equal(*bart[:2], texts, tmp_path, no_repeat_ngram_size=1)
    assert (tokens[:, 0] == 7).all()
    assert (tokens[:, -1] == 2).all()


def test_what_follows_the_head_is_in_its_part(bart):
    site = read_export(bart[1].export(bart[2])).cut["sites"]["lm_head"]
    assert (site["module"], site["follows"]) == ("lm_head", ["add"])


def test_beams_and_a_start_of_ones_own_are_those_of_transformers(bart, texts):
    model, proxy, _ = bart
    start = np.array([[2, 11, 5], [2, 40, 8]])
    settings = {"num_beams": 3, "decoder_input_ids": torch.from_numpy(start)}
    inputs = {name: torch.from_numpy(array) for name, array in texts.items()}
    with torch.no_grad():
        wanted = model.generate(**inputs, **settings, max_new_tokens=NEW)
    given = {**texts, "decoder_input_ids": start}
    result = proxy.generate(inputs=given, generation_len=NEW, num_beams=3)
    np.testing.assert_array_equal(result.generated_ids, wanted[:, 3:].numpy())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.full((1, 25), 5)}, "25 tokens, and the encoder has 24 positions"),
        ({"input_ids": np.full((1, 3), VOCABULARY)}, f"{VOCABULARY} is no token of this model"),
        (
            {"input_ids": np.full((1, 3), 5), "attention_mask": np.array([[0, 1, 1]])},
            "Pad on the right",
        ),
        (
            {"input_ids": np.full((2, 3), 5), "decoder_input_ids": np.full((1, 2), 5)},
            "decoder_input_ids has 1 rows for 2 texts",
        ),
        ({"input_ids": np.full((1, 3), 5), "labels": np.full((1, 2), 5)}, "nothing uses"),
    ],
)
def test_what_cannot_be_right_is_refused(bart, inputs, message):
    with pytest.raises(UsageError, match=message):
        bart[1].generate(inputs=inputs)


def test_beams_of_the_checkpoint_are_not_dumped_in_silence(bart, texts, tmp_path):
    """The dump keeps the rows that a step adds to the cache, and beams reorder those before."""
    config = GenerationConfig(num_beams=2)
    with pytest.raises(UsageError, match="asks for 2 beams"):
        bart[1].generate(inputs=texts, generation_config=config, io_dir=tmp_path / "io")


def test_tokens_beyond_the_decoders_positions_are_refused(bart, texts):
    with pytest.raises(UsageError, match="context of 24"):
        bart[1].generate(inputs=texts, generation_len=30)


@pytest.mark.parametrize(
    ("kind", "config", "dtype", "tolerance"),
    [
        (BartForConditionalGeneration, BartConfig(**{**BART, **FEW}), "float16", 2e-2),
        (T5ForConditionalGeneration, T5Config(**{**T5, **FEW}), "bfloat16", 5e-2),
    ],
    ids=["bart", "t5"],
)
def test_half_precision(kind, config, dtype, tolerance, texts, tmp_path):
    """Layers of BART ask whether float16 overflowed, which a trace cannot."""
    model = shaken(kind(config)).to(getattr(torch, dtype))
    folder = checkpoint(model, tmp_path / "checkpoint")
    proxy = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder, enable_proxy=True, dtype=dtype)
    proxy.export(tmp_path / "export")
    proxy.compile(backend="onnxruntime" if dtype == "float16" else "torch")
    tokens, _ = expected(model, texts, no_repeat_ngram_size=1)
    start = np.concatenate([np.full((2, 1), model.config.decoder_start_token_id), tokens], axis=1)
    given = {**texts, "decoder_input_ids": start[:, :-1]}
    result = proxy.generate(inputs=given, generation_len=1, io_dir=tmp_path / "io")
    inputs = {name: torch.from_numpy(array) for name, array in given.items()}
    with torch.no_grad():
        wanted = model(**inputs).logits.float().numpy()
    actual = read_dump(result.io_folder).array("prefill", 0, "lm_head.out.logits")
    off = np.abs(actual.astype(np.float32) - wanted[:, -1:]).max()
    assert off < tolerance * np.abs(wanted).max()


def test_t5_is_streamed_by_kinds_of_layers(t5):
    """The first layer, which alone holds the bias of positions, is a kind of its own."""
    cut = read_export(t5[1].export(t5[2])).cut
    assert cut["weights"].startswith("streamed from the checkpoint; BLAKE3")
    assert [kind["layers"] for kind in cut["layers"]["kinds"]] == [[0], [1, 2, 3, 4]]
    assert cut["traced_layers"] == {"encoder": 3, "body": 2}
    assert cut["sites"]["embedding"]["module"] == "decoder.embed_tokens"


def test_the_vocabulary_is_stored_once_and_apart(t5):
    files = read_export(t5[1].export(t5[2])).files
    assert files["vocabulary.safetensors"] < 4 * VOCABULARY * 32 + 1000


def test_by_layer_the_bias_of_positions_reaches_the_later_layers(tmp_path):
    """Only the first layer makes it; without it each of the others has another output."""
    model = shaken(T5ForConditionalGeneration(T5Config(**{**T5, **FEW})))
    loaded = wrap_model(model)
    hooks = Plugins.discover().hooks_for("t5", task="seq2seq")
    export = export_model(loaded, hooks, output=tmp_path / "export", taps="layers")
    options = VerifyOptions(max_new_tokens=3)
    found = verify_layers_of(export, loaded, ["onnxruntime"], (None, None), options, hooks)
    (result,) = found.results
    names = [layer.name for layer in result.layers]
    assert names[1:3] == ["encoder layer 0", "encoder layer 1"]
    assert result.passed
    assert result.error is None


def test_the_command_line_takes_the_task_from_the_architecture(t5, tmp_path):
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1")
    folder = checkpoint(t5[0], tmp_path)
    fast.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert flow_of(loaded) == "seq2seq"
    hooks = Plugins.discover().hooks_for("t5", task="seq2seq")
    tensors = hooks.preprocess(fast, Request(prompts=["w5 w6 w7", "w8"]))
    assert tensors["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert hooks.decode(fast, {"generated_ids": np.array([[4, 1, 0]])}) == ["w4"]


def test_other_models_are_refused_by_name():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    hooks = Hooks("gpt2", generic, owner=seq2seq, plugin="seq2seq")
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel is no encoder-decoder"):
        hooks.locate_embedding(model, model.config)
