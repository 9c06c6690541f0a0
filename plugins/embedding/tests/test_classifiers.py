"""Classifiers of texts and tokens on ONNX Runtime, against the uncut models in PyTorch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from qeff_proxy import (
    QEFFAutoModelForSequenceClassification,
    QEFFAutoModelForTokenClassification,
)
from qeff_proxy.cli import main
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.load.load_model import flow_of, load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing import random_weights
from qeff_proxy_embedding.classifier import decode
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)

pytestmark = pytest.mark.one_home

VOCABULARY, LENGTHS = 61, (9, 6, 4)
LABELS = {0: "bad", 1: "so so", 2: "good"}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "id2label": LABELS,
}
QWEN = {
    **BERT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "id2label": {0: "yes"},
}


def tokenizer():
    words = {word: n for n, word in enumerate(["[PAD]", "[SEP]", "[CLS]"])}
    words |= {f"w{n}": n for n in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 1)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", sep_token="[SEP]", model_input_names=names
    )


def saved(model, folder):
    model = random_weights(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("bert.embeddings", "bert.pooler", "classifier", "score")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    model = BertForSequenceClassification(BertConfig(**BERT))
    model, folder = saved(model, tmp_path_factory.mktemp("bert"))
    proxy = QEFFAutoModelForSequenceClassification.from_pretrained(folder, enable_proxy=True)
    proxy.export(folder / "export")
    return model, folder, proxy


def padded():
    generator = np.random.default_rng(2)
    ids = generator.integers(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(model, inputs):
    """The logits of each row, run alone."""
    rows = [inputs["input_ids"][row : row + 1, :length] for row, length in enumerate(LENGTHS)]
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(ids)).logits[0].numpy() for ids in rows]


def test_the_labels_and_logits_are_those_of_the_model(bert, tmp_path):
    model, _, proxy = bert
    expected = np.stack(alone(model, padded()))
    assert len(set(expected.argmax(-1))) > 1, "one label for all would prove nothing"
    result = proxy.generate(padded(), batch_size=3, io_dir=tmp_path / "io")
    np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    assert result.labels == [LABELS[index] for index in expected.argmax(-1)]
    softmax = torch.from_numpy(expected).softmax(-1).numpy()
    scores = [[score[label] for label in LABELS.values()] for score in result.scores]
    np.testing.assert_allclose(scores, softmax, atol=1e-5)
    dumped = read_dump(result.io_folder).array("prefill", 0, "body.out.logits")
    assert dumped.shape == (3, 3)


def test_pairs_are_told_apart_by_their_types(bert):
    model, _, proxy = bert
    encoded = tokenizer()("w5 w6", "w7 w8 w9", return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits.numpy()
        same = model(input_ids=encoded["input_ids"]).logits.numpy()
    assert np.abs(expected - same).max() > 1e-3, "token types must matter"
    result = proxy.generate(["w5 w6"], pairs=["w7 w8 w9"])
    np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    with pytest.raises(UsageError, match="1 texts and 2 others"):
        proxy.generate(["w5"], pairs=["w6", "w7"])


def test_the_command_line_takes_the_task_from_the_architecture(bert, capsys):
    _, folder, proxy = bert
    assert flow_of(load_model(str(folder))) == "classification"
    expected = proxy.generate("w5 w6")
    assert main(["generate", str(folder / "export"), "w5 w6", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["classes"]
    assert found == {"label": expected.labels[0], "scores": expected.scores[0]}
    assert main(["generate", str(folder / "export"), "w5 w6"]) == 0
    assert f"w5 w6: {expected.labels[0]} (0." in capsys.readouterr().out


def test_a_decoder_scores_its_last_token(tmp_path):
    """With one label the score is a sigmoid; padding tokens at the end do not count."""
    model = Qwen3ForSequenceClassification(Qwen3Config(**QWEN))
    model, folder = saved(model, tmp_path)
    proxy = QEFFAutoModelForSequenceClassification.from_pretrained(folder, enable_proxy=True)
    proxy.export(folder / "export")
    inputs = padded()
    expected = np.stack(alone(model, inputs))
    result = proxy.generate(inputs, batch_size=3)
    np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    scores = [score["yes"] for score in result.scores]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-expected[:, 0])), atol=1e-4)
    unmasked = proxy.generate({"input_ids": inputs["input_ids"]})
    np.testing.assert_allclose(unmasked.logits, expected, atol=1e-4)


def test_a_mean_of_all_scores_is_no_score_of_the_last_token():
    """The cut compares its parts with the uncut model, run on each row alone."""
    sizes = {name: size for name, size in QWEN.items() if name != "layer_types"}
    config = EuroBertConfig(**sizes, classifier_pooling="late", mask_token_id=2)
    model = random_weights(EuroBertForSequenceClassification(config))
    hooks = Plugins.discover().hooks_for("eurobert", task="classification")
    report = cut_model(wrap_model(model), hooks, "split").report
    assert report.max_difference <= report.tolerance * report.largest_value


def test_each_token_gets_its_label(tmp_path):
    model = BertForTokenClassification(BertConfig(**{**BERT, "num_hidden_layers": 2}))
    model, folder = saved(model, tmp_path)
    proxy = QEFFAutoModelForTokenClassification.from_pretrained(folder, enable_proxy=True)
    proxy.export(folder / "export")
    expected = alone(model, padded())
    result = proxy.generate(padded(), batch_size=3)
    for logits, labels, row in zip(result.logits, result.labels, expected, strict=True):
        np.testing.assert_allclose(logits, row, atol=1e-4)
        assert labels == [LABELS[index] for index in row.argmax(-1)]


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_those_of_transformers_pipelines(count, problem):
    logits = np.random.default_rng(4).standard_normal((1, 2, count), np.float32) * 3
    labels = [f"l{n}" for n in range(count)]
    config = BertConfig(**{**BERT, "id2label": dict(enumerate(labels)), "problem_type": problem})
    text = TextClassificationPipeline(
        model=BertForSequenceClassification(config), tokenizer=tokenizer()
    )
    (found,) = decode({"logits": logits[0, :1], "labels": labels, "problem_type": problem})
    expected = text.postprocess({"logits": torch.from_numpy(logits[:, 0])}, top_k=None)
    assert found["scores"] == pytest.approx({one["label"]: one["score"] for one in expected})
    words = tokenizer()("w5", add_special_tokens=False, return_tensors="pt")
    tokens = TokenClassificationPipeline(
        model=BertForTokenClassification(config), tokenizer=tokenizer()
    )
    (found,) = decode({"logits": logits[:, :1], "labels": labels, "problem_type": problem})
    places = {"offset_mapping": torch.tensor([[[0, 2]]]), "sentence": "w5"}
    outputs = {**words, **places, "special_tokens_mask": torch.zeros(1, 1)}
    (expected,) = tokens.postprocess([{**outputs, "logits": torch.from_numpy(logits[:, :1])}])
    assert found[0]["label"] == expected["entity"]
    assert found[0]["scores"][expected["entity"]] == pytest.approx(expected["score"])


LONGFORMER = {**BERT, "attention_window": [4, 4, 8, 4, 4], "pad_token_id": 0}


def test_tokens_of_windows_are_labelled(tmp_path):
    model = LongformerForTokenClassification(LongformerConfig(**LONGFORMER))
    model, folder = saved(model, tmp_path)
    proxy = QEFFAutoModelForTokenClassification.from_pretrained(folder, enable_proxy=True)
    proxy.export(folder / "export")
    result = proxy.generate(padded(), batch_size=3)
    for logits, row in zip(result.logits, alone(model, padded()), strict=True):
        np.testing.assert_allclose(logits, row, atol=1e-4)


@pytest.mark.parametrize("kind", ["split", "whole"])
def test_a_token_that_attends_to_all_is_refused(kind):
    model = LongformerForSequenceClassification(LongformerConfig(**LONGFORMER)).eval()
    with pytest.raises(UnsupportedModelError, match="attend to all others"):
        QEFFAutoModelForSequenceClassification(model, proxy=kind).export()


def test_an_embedder_is_no_classifier(tmp_path):
    from transformers import BertModel

    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="QEFFAutoModel"):
        QEFFAutoModelForSequenceClassification.from_pretrained(tmp_path, enable_proxy=True).export(
            tmp_path / "export"
        )
