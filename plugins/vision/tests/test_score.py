"""Answers to questions about an image, of PyTorch and of a backend that says something else."""

from __future__ import annotations

from pathlib import Path

import qeff_proxy_vision
from qeff_proxy import Plugins
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.score.score_answers import AnswerScorer, _begun_alike

CHECKPOINTS = Path(qeff_proxy_vision.__file__).parent / "checkpoints"
DRAWING = CHECKPOINTS / "drawings" / "drawing.png"


def test_the_words_before_another_are_counted():
    said = ["a", "red", "square", "on", "grass"]
    assert _begun_alike(said, ["a", "red", "house", "on", "grass"]) == 2 / 5
    assert _begun_alike(said, [*said, "and", "sky"]) == 1
    assert _begun_alike(said, []) == 0


class OtherWord:
    """The session of the head, which says another word from the third on."""

    def __init__(self, session, token):
        self.session, self.token, self.runs = session, token, 0

    def run(self, feeds):
        outputs = self.session.run(feeds)
        self.runs += 1
        if self.runs > 2:
            outputs["logits"][..., self.token] = 1e3
        return outputs


def test_answers_are_compared(tmp_path):
    folder = CHECKPOINTS / "tiny-llava"
    listed = tmp_path / "questions.tsv"
    questions = ("What is in the picture?", "Where is the red shape?")
    listed.write_text("\n".join(f"{DRAWING}\t<image> {question}" for question in questions))
    hooks = Plugins.discover().hooks_for("llava")
    export = export_model(load_model(str(folder)), hooks, output=tmp_path / "export")
    processor = load_processor(folder)
    (token,) = processor.tokenizer("house", add_special_tokens=False)["input_ids"][:1]
    compiled = compile_export(export)
    with open_sessions(compiled, hooks) as sessions:
        scorer = AnswerScorer(listed, None, 5, sessions, lambda _: None, processor, hooks, 6)
        same = scorer.measure(compiled, sessions)
        other = scorer.measure(
            compiled, {**sessions, "lm_head": OtherWord(sessions["lm_head"], token)}
        )
    assert same.measures == {"same": 1, "alike": 1}
    assert same.worst == ()
    assert same.said == "2 answers compared"
    assert other.measures["same"] == 0
    shown = other.worst[0]
    assert shown.file == "drawing.png"
    assert shown.reference != shown.candidate
    assert 0 < other.measures["alike"] < 1  # the first answer begins as PyTorch's
    assert "in PyTorch and" in str(shown)
