"""Masked LMs on ONNX Runtime, against the uncut models and pipelines of transformers."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from qeff_proxy import QEFFAutoModel, QEFFAutoModelForMaskedLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.load.load_model import flow_of, load_model
from qeff_proxy.testing import random_weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    FNetConfig,
    FNetForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

pytestmark = pytest.mark.one_home

VOCABULARY, LENGTHS = 61, (9, 6, 4)
ONE, TWO = "w5 w7 [MASK] w9 w30", "[MASK] w8 w12 [MASK]"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 5, "n_heads": 4, "hidden_dim": 40}
MODERN = {"local_attention": 6, "cls_token_id": 2, "sep_token_id": 1, "bos_token_id": 2}
MODERN |= {"eos_token_id": 1}
KINDS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTIL)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, **MODERN)),
}


def tokenizer():
    words = {word: n for n, word in enumerate(["[PAD]", "[SEP]", "[CLS]", "[MASK]"])}
    words |= {f"w{n}": n for n in range(4, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def saved(model, folder):
    model = random_weights(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return saved(KINDS[request.param](), folder), folder


def test_padded_batches_give_the_logits_of_each_row_alone(checkpoint):
    model, folder = checkpoint
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, VOCABULARY, (1, length)) for length in LENGTHS]
    ids = np.zeros((len(rows), max(LENGTHS)), np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : row.shape[1]], mask[number, : row.shape[1]] = row, 1
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    proxy = QEFFAutoModelForMaskedLM.from_pretrained(folder, proxy="split")
    logits = proxy.generate(given).logits
    for row, actual in zip(rows, logits, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(row)).logits[0].numpy()
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_guesses_are_those_of_a_pipeline(checkpoint):
    model, folder = checkpoint
    found = QEFFAutoModelForMaskedLM.from_pretrained(folder, proxy="split").generate([ONE, TWO])
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer())
    for scores, text in zip(found.scores, (ONE, TWO), strict=True):
        expected = fill(text)
        expected = [expected] if text == ONE else expected
        for one, best in zip([scores] if text == ONE else scores, expected, strict=True):
            assert [*one] == [guess["token_str"] for guess in best]
            assert [*one.values()] == pytest.approx([guess["score"] for guess in best], rel=1e-4)
    assert found.labels[1] == [next(iter(one)) for one in found.scores[1]]


def test_the_head_is_no_part_of_the_body(checkpoint, tmp_path):
    _, folder = checkpoint
    proxy = QEFFAutoModelForMaskedLM.from_pretrained(folder, proxy="split")
    export = read_export(proxy.export())
    assert [part.name for part in export.parts] == ["embedding", "body", "lm_head"]
    body = onnx.load(export.folder / "body.onnx", load_external_data=False)
    assert not [one.name for one in body.graph.initializer if VOCABULARY in one.dims]
    proxy.generate(ONE, io_dir=tmp_path / "io")
    names = {(name.part, name.tensor) for _, name in read_dump(tmp_path / "io").tensors}
    assert {
        ("body", "inputs_embeds"),
        ("lm_head", "last_hidden_state"),
        ("lm_head", "logits"),
    } <= names


def test_the_command_guesses_and_verifies(tmp_path, capfd):
    saved(KINDS["bert"](), tmp_path / "bert")
    folder = str(tmp_path / "bert")
    assert flow_of(load_model(folder)) == "masked-lm"
    assert main(["generate", folder, ONE, "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)["classes"]
    best = pipeline("fill-mask", model=folder)(ONE)[0]
    assert found["label"] == best["token_str"]
    assert main(["generate", folder, ONE]) == 0
    assert capfd.readouterr().out.startswith(f"{ONE}: {best['token_str']} (0.")
    assert main(["verify", folder, "--backend", "onnxruntime"]) == 0
    said = capfd.readouterr().out
    assert "[MASK]" in said
    assert "PyTorch says: 'w" in said


def test_a_stub_has_no_weights_of_the_vocabulary(tmp_path):
    saved(KINDS["bert"](), tmp_path)
    export = read_export(QEFFAutoModelForMaskedLM.from_pretrained(tmp_path, proxy="stub").export())
    assert export.parts[0].outputs[0].shape == ("batch", "sequence", 32)


def test_its_encoder_is_still_an_embedding_model(tmp_path):
    model = saved(KINDS["bert"](), tmp_path)
    with pytest.warns(UserWarning, match="a head for another task"):
        found = QEFFAutoModel.from_pretrained(tmp_path, pooling="cls").generate("w5 w6")
    with torch.no_grad():
        expected = model.bert(**tokenizer()("w5 w6", return_tensors="pt"))[0][:, 0].numpy()
    assert np.abs(found.embeddings - expected).max() < 1e-5 * np.abs(expected).max()


def test_padding_that_the_mask_counts_is_refused_where_a_model_numbers_it_otherwise(tmp_path):
    """RoBERTa's positions follow from the token ids, which a body does not get."""
    config = RobertaConfig(**{**SIZES, "pad_token_id": 1})
    model = saved(RobertaForMaskedLM(config), tmp_path)
    ids = {"input_ids": torch.tensor([[2, 9, 8, 1, 1]])}
    seen = {**ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    split = QEFFAutoModelForMaskedLM.from_pretrained(tmp_path, proxy="split")
    with pytest.raises(UsageError, match="token 1 is padding to this model"):
        split.generate(ids)
    whole = QEFFAutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        padded, alone = model(**ids).logits[0].numpy(), model(ids["input_ids"][:, :3]).logits[0]
    for proxy, given, wanted in ((whole, ids, padded), (split, seen, alone.numpy())):
        (logits,) = proxy.generate(given).logits
        assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_what_padding_changes_runs_alone(tmp_path):
    config = FNetConfig(**{**SIZES, "type_vocab_size": 2, "tpu_short_seq_length": 24})
    model = saved(FNetForMaskedLM(config), tmp_path)
    found = QEFFAutoModelForMaskedLM.from_pretrained(tmp_path, proxy="split").generate([ONE, TWO])
    with torch.no_grad():
        alone = model(tokenizer()(TWO, return_tensors="pt")["input_ids"]).logits[0].numpy()
    assert np.abs(found.logits[1] - alone).max() < 1e-5 * np.abs(alone).max()


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 40}
    saved(T5ForConditionalGeneration(T5Config(**sizes, d_kv=8)), tmp_path)
    with pytest.raises(UnsupportedModelError):
        QEFFAutoModelForMaskedLM.from_pretrained(tmp_path).export()
