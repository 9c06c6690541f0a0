"""Text encoder-decoders on ONNX Runtime, against transformers' own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForSeq2SeqLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.dump import read_dump
from qeff_proxy.testing import random_weights
from transformers import T5Config, T5ForConditionalGeneration

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


def shaken(model, seed=1, scale=0.3):
    """Random weights, large enough that the tokens of a text differ."""
    model = random_weights(model, seed)
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
    proxy.export(folder / "export")
    return model, proxy


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
    tokens = check_equal(*t5, texts, tmp_path)
    alone = {name: array[1:, :6] for name, array in texts.items()}
    np.testing.assert_array_equal(expected(t5[0], alone)[0], tokens[1:])


def test_t5_is_streamed_by_kinds_of_layers(t5):
    """The first layer, which alone holds the bias of positions, is a kind of its own."""
    cut = read_export(t5[1].export()).cut
    assert cut["weights"].startswith("streamed from the checkpoint; BLAKE3")
    assert [kind["layers"] for kind in cut["layers"]["kinds"]] == [[0], [1, 2, 3, 4]]
    assert cut["traced_layers"] == {"encoder": 3, "body": 2}
    assert cut["sites"]["embedding"]["module"] == "decoder.embed_tokens"


def test_the_vocabulary_is_stored_once_and_apart(t5):
    files = read_export(t5[1].export()).files
    assert files["vocabulary.safetensors"] < 4 * VOCABULARY * 32 + 1000
