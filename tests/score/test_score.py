"""Perplexity, divergence and the worst tokens of a text, against plain PyTorch."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.backends.torch.backend import TorchBackend
from qeff_proxy.cli import main
from qeff_proxy.compare.tally import Tally
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.score import ScoreOptions, score_model
from qeff_proxy.score.results import check_limits, missed_limits, parse_limits
from qeff_proxy.score.windows import windows_of
from qeff_proxy.verify.options import VerifyOptions
from torch.nn.functional import kl_div, nll_loss

pytestmark = pytest.mark.one_home

LINES = [
    "One day the cat sat on the mat and saw a big red dog.",
    "The dog said: let us play in the garden, it is a sunny day!",
    "They ran and ran, and then the little girl came with her ball.",
    "She was happy. 'What a good day', she said, and they all went home.",
]
WINDOW = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(LINES * 4), encoding="utf-8")
    return path


@pytest.fixture
def noisy(monkeypatch):
    """Registers PyTorch with a little noise in its logits as a backend."""

    class Noisy(TorchBackend):
        def open(self, *args):
            session = super().open(*args)
            run, generator = session.run, np.random.default_rng(0)

            def changed(feeds):
                outputs = run(feeds)
                if (value := outputs.get("logits")) is not None:
                    noise = generator.standard_normal(value.shape).astype(value.dtype)
                    outputs["logits"] = value + 0.3 * noise
                return outputs

            session.run = changed
            return session

    class Rounded(TorchBackend):
        def open(self, *args):
            session = super().open(*args)  # of a model of the backend's own
            with torch.no_grad():
                for part in self._proxy.parts:
                    for weight in part.module.parameters():
                        weight.copy_(weight.bfloat16())
            return session

    class Broken(TorchBackend):
        def open(self, *args):
            session = super().open(*args)
            run = session.run
            session.run = lambda feeds: {n: v * np.nan for n, v in run(feeds).items()}
            return session

    module = ModuleType("noisy_score_backend")
    module.Noisy, module.Rounded, module.Broken = Noisy, Rounded, Broken
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("Noisy", "Rounded", "Broken"):
        monkeypatch.setitem(BUILTIN_BACKENDS, name.lower(), f"{module.__name__}:{name}")


def test_the_measures_are_pytorchs_own():
    """Cross entropy and KL divergence of torch.nn.functional, in float64."""
    generator = torch.Generator().manual_seed(0)
    expected, tokens = torch.randn(2, 40, 97, generator=generator), torch.arange(80).reshape(2, 40)
    actual = expected + 0.2 * torch.randn(expected.shape, generator=generator)
    tally = Tally(keep=3)
    for row in range(2):
        tally.add(expected[row].numpy(), actual[row].numpy(), tokens[row].numpy(), 20)
    p, q = (x[:, 19:39].reshape(-1, 97).double().log_softmax(1) for x in (expected, actual))
    ids = tokens[:, 20:].reshape(-1)
    kl = kl_div(q, p, log_target=True, reduction="none").sum(1)
    best = q.topk(5).indices
    flips = (p.argmax(1) == ids) != (q.argmax(1) == ids)
    assert tally.measures() == pytest.approx(
        {
            "reference": nll_loss(p, ids).exp().item(),
            "candidate": nll_loss(q, ids).exp().item(),
            "ratio": (nll_loss(q, ids) - nll_loss(p, ids)).exp().item(),
            "kl": kl.mean().item(),
            "top1": (p.argmax(1) == q.argmax(1)).double().mean().item(),
            "top5": (best == p.argmax(1)[:, None]).any(1).double().mean().item(),
            "flips": flips.double().mean().item(),
        },
        rel=1e-9,
    )
    median = kl.quantile(0.5, interpolation="lower").item()
    assert tally.quantile(0.5) == pytest.approx(median, 0.02)
    assert tally.quantile(1.0) == pytest.approx(kl.max().item(), 0.02)
    worst = sorted(tally.worst, reverse=True)
    assert [one.kl for one in worst] == pytest.approx(kl.sort(descending=True).values[:3].tolist())
    place = int(kl.argmax())
    assert (worst[0].window, worst[0].position) == (place // 20, 20 + place % 20)


def test_an_interval_holds_the_true_value_as_often_as_it_says():
    """Windows whose divergence is drawn anew: 95 of 100 intervals hold the mean, give or take."""
    draws, held = np.random.default_rng(0), 0
    for _ in range(100):
        tally = Tally()
        tally.windows = [np.array([10, 1, 1, kl, 0, 0, 0.0]) for kl in draws.exponential(5, 60)]
        low, high = tally.intervals()["kl"]
        held += low <= 0.5 <= high
    assert 85 <= held <= 99


def test_perplexity_is_that_of_transformers(demo_checkpoint, eager, tokenizer, text):
    options = ScoreOptions(window=WINDOW)
    score = score_model(str(demo_checkpoint), ["onnxruntime", "torch"], text, options)
    losses, count = 0.0, 0
    windows = list(windows_of(text, tokenizer, WINDOW))
    ids = tokenizer(text.read_text())["input_ids"]
    assert np.concatenate(windows, 1)[0].tolist() == ids
    for window in windows:
        tokens = torch.from_numpy(window)
        with torch.no_grad():
            logits = eager(tokens).logits[0].double()
        first = max(1, tokens.shape[1] // 2)
        chosen = logits[first - 1 : -1].log_softmax(1).gather(1, tokens[0, first:, None])
        losses, count = losses - chosen.sum().item(), count + len(chosen)
    assert score.scored == count
    assert score.said == f"{count} tokens scored, in {len(windows)} windows of {WINDOW}"
    for one in score.backends:
        assert one.error is None
        assert one.measures["reference"] == pytest.approx(np.exp(losses / count), rel=1e-5)
        assert one.measures["candidate"] == pytest.approx(np.exp(losses / count), rel=1e-5)
        assert one.measures["kl"] < 1e-9
        assert one.measures["top1"] == 1


def test_six_layers_on_a_text_longer_than_their_context(
    make_model, tokenizer, text, noisy, tmp_path
):
    """In batches and chunks: what transformers and torch.nn.functional make of whole windows."""
    model = make_model("gpt2", layers=6, vocab_size=len(tokenizer), max_position_embeddings=WINDOW)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "six")
    compiling = CompileOptions(batch_size=3, prefill_seq_len=20)
    options = ScoreOptions(verify=VerifyOptions(compile=compiling))
    score = score_model(str(tmp_path / "six"), ["rounded", "onnxruntime"], text, options)

    windows = list(windows_of(text, tokenizer, WINDOW))
    assert len(windows) > 4
    with torch.no_grad():
        sides = [[model(torch.from_numpy(ids)).logits[0] for ids in windows]]
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
        sides.append([model(torch.from_numpy(ids)).logits[0] for ids in windows])
    halves = [ids.shape[1] // 2 for ids in windows]
    p, q = (
        torch.cat([one[half - 1 : -1] for one, half in zip(side, halves, strict=True)])
        .double()
        .log_softmax(-1)
        for side in sides
    )
    tokens = torch.from_numpy(
        np.concatenate([ids[0, half:] for ids, half in zip(windows, halves, strict=True)])
    )
    rounded, exact = score.backends
    wanted = {
        "reference": nll_loss(p, tokens).exp(),
        "candidate": nll_loss(q, tokens).exp(),
        "kl": kl_div(q, p, log_target=True, reduction="sum") / len(p),
        "top1": (p.argmax(1) == q.argmax(1)).double().mean(),
    }
    assert {name: rounded.measures[name] for name in wanted} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-4
    )
    assert rounded.measures["kl"] > 1e-6
    assert exact.measures["candidate"] == pytest.approx(wanted["reference"].item(), rel=1e-4)
    assert score.scored == len(tokens)


def test_chunks_and_batches_change_nothing(demo_export, text):
    whole = score_model(demo_export, ["torch"], text, ScoreOptions(window=WINDOW))
    options = VerifyOptions(compile=CompileOptions(batch_size=3, prefill_seq_len=7))
    pieces = score_model(demo_export, ["torch"], text, ScoreOptions(window=WINDOW, verify=options))
    for one, other in zip(whole.backends, pieces.backends, strict=True):
        assert other.measures["candidate"] == pytest.approx(one.measures["candidate"], rel=1e-6)
        assert pieces.said == whole.said


def test_a_worse_backend_is_told_with_its_worst_tokens(demo_export, text, noisy, capsys):
    command = ["score", str(demo_export), "--text", str(text), "--window", str(WINDOW), "--json"]
    command += ["--backend", "torch", "--backend", "noisy", "--backend", "broken"]
    assert main([*command, "--limit", "kl:0.001"]) == 1
    value = json.loads(capsys.readouterr().out)
    good, worse, broken = value["backends"]
    assert good["missed"] == []
    assert worse["missed"][0].startswith("kl ")
    low, high = worse["intervals"]["kl"]
    # Of noise of variance 0.09 in the logits, the divergence is half of that, less p's own share.
    assert 0.01 < low < worse["measures"]["kl"] < high < 0.045
    assert "NaN or infinite elements in window 1" in broken["error"]
    first = worse["worst"][0]
    assert first["kl"] == worse["measures"]["max"]
    assert first["before"][-20:] + first["token"] in text.read_text()
    assert main([*command[:-4], "--limit", "kl:0.001"]) == 0


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (b"", (), "too few tokens"),
        (b"\xff\xfe\x00", (), "is no text in UTF-8"),
        (b"a text", ("--window", "1"), "a window of 1 tokens does not fit"),
        (b"a text", ("--window", "9999"), "a window of 9999 tokens does not fit"),
        (b"a text", ("--limit", "speed:1"), "--limit speed:1 is not NAME:VALUE"),
        (b"a text of words", ("--limit", "wer:1"), "wer is not measured of such a model"),
        (b"a text", ("--windows", "0"), "--windows is 0"),
        (None, (), "cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line(content, options, problem, demo_export, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["score", str(demo_export), "--text", str(path), *options]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


def test_a_checkpoint_without_tokenizer_is_refused(demo_checkpoint, text, tmp_path):
    for file in demo_checkpoint.iterdir():
        if not file.name.startswith(("tokenizer", "special", "vocab", "merges")):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        score_model(str(tmp_path), ["torch"], text)


def test_a_text_longer_than_a_block_is_streamed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("qeff_proxy.score.windows._BLOCK", 40)
    path = tmp_path / "long.txt"
    path.write_text("\n".join(LINES * 3) + "\n")
    windows = list(windows_of(path, tokenizer, 16))
    assert all(window.shape == (1, 16) for window in windows[:-1])
    assert tokenizer.decode(np.concatenate(windows, 1)[0]) == path.read_text()


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path):
    class Words:
        def __call__(self, text, add_special_tokens=True):
            ids = [10 + len(word) for word in text.split()]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    path = tmp_path / "words.txt"
    path.write_text("a bb ccc dddd eeeee ffffff g")
    windows = [window[0].tolist() for window in windows_of(path, Words(), 4)]
    assert windows == [[1, 11, 12, 13], [1, 14, 15, 16], [1, 11]]


def test_hopeless_tokens_are_in_the_quantiles():
    """A divergence beyond all bins, as of logits that are off by orders of magnitude."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((40, 9)).astype(np.float32)
    tally = Tally(keep=0)
    tally.add(logits, -1e5 * logits, np.arange(40) % 9, 1)
    assert tally.largest > 1e4
    assert tally.quantile(0.5) == tally.quantile(0.99) == tally.largest
    assert missed_limits({"p99": tally.quantile(0.99)}, {"p99": 0.1})


def test_limits_are_read_and_a_nan_keeps_none():
    limits = parse_limits("kl:0.01,top1:0.9")
    assert missed_limits({"kl": 0.02, "top1": 0.8}, limits) == (
        "kl 0.02 is above 0.01",
        "top1 0.8 is below 0.9",
    )
    with pytest.raises(
        UsageError, match=r"wer is not measured of such a model. Limits are of kl\."
    ):
        check_limits({"wer": 0.1}, ("kl",))
    assert len(missed_limits({"kl": float("nan"), "top1": 1.0}, limits)) == 1
    with pytest.raises(UsageError):
        parse_limits("kl:nan")
