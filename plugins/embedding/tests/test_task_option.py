"""``--model-task``: a checkpoint is used for another task than its config names."""

from __future__ import annotations

import json

import pytest
from qeff_proxy.cli import main
from qeff_proxy.testing.tiny import random_weights
from transformers import BertConfig, BertForMaskedLM

pytestmark = pytest.mark.one_home

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 97}


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "bert"
    config = BertConfig(**SIZES, num_hidden_layers=5, max_position_embeddings=40)
    random_weights(BertForMaskedLM(config).eval(), 0).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("default::UserWarning")  # the head is not used, which is said
def test_the_encoder_of_a_masked_lm(masked_lm, capsys, tmp_path):
    assert main(["inspect", masked_lm, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"]["lm_head"]["module"]
    command = [
        "verify",
        masked_lm,
        "--model-task",
        "embedding",
        "--output",
        str(tmp_path / "export"),
    ]
    assert main([*command, "--json"]) == 0
    (backend,) = json.loads(capsys.readouterr().out)["backends"]
    assert backend["passed"]
    export = ["inspect", masked_lm, "--model-task", "text"]
    assert main(export) == 4
    capsys.readouterr()
    assert main(["compile", str(tmp_path / "export"), "--model-task", "text"]) == 2
    assert "--model-task text contradicts" in capsys.readouterr().err
    assert main(["compile", str(tmp_path / "export"), "--model-task", "embedding"]) == 0


def test_a_task_that_is_none(masked_lm, capsys):
    assert main(["inspect", masked_lm, "--model-task", "cooking"]) == 2
    assert "embedding" in capsys.readouterr().err
