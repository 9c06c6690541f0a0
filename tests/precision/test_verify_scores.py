"""``verify`` of a lower precision says what it does to the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from torch.nn.functional import kl_div

pytestmark = pytest.mark.one_home


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


def test_full_precision_is_not_scored(demo_checkpoint, capsys):
    assert main(["verify", str(demo_checkpoint), "--max-new-tokens", "2", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["backends"]
    assert result["scores"] == {}
