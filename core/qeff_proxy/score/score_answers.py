"""Score what a model says: transcripts of recordings, answers to questions about images.

Each line of the text names a file and, behind a tab, a text: what is said in a recording, or the
question about an image. PyTorch and the backend run on each.

The word error rate is the least number of words that are inserted, deleted or replaced between
the given transcript and the model's, over the words of the former (Levenshtein's distance), of
words in lower case without punctuation.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qeff_proxy.backends.compile_export import Compiled
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import generates, run_compiled
from qeff_proxy.score.results import Measured, WorstAnswer
from qeff_proxy.score.scorer import Scorer
from qeff_proxy.score.windows import blocks_of
from qeff_proxy.session.session import Session

#: What is measured of answers, and more of transcripts.
ANSWERS, TRANSCRIPTS = ("same", "alike"), ("wer_reference", "wer", "wer_more")
_ANSWER = 64  # tokens
_DRAWS = 1000
_NOT_WORDS = re.compile(r"[^\w\s']|_")


@dataclass(frozen=True)
class Listed:
    """A line of a list of files.

    Attributes:
        file: A recording or an image.
        kind: Which of them.
        text: What is said in it, or the question.
    """

    file: Path
    kind: Literal["audio", "image"]
    text: str

    @property
    def request(self) -> Request:
        """The model's input."""
        if self.kind == "audio":
            return Request(audio=(str(self.file),))
        return Request(prompts=(self.text,), images=(str(self.file),))


def listed_in(path: Path) -> Iterator[Listed]:
    """Yield the lines of a list of files; nothing where the first line is none of such a list.

    Args:
        path: A text in UTF-8. Files are relative to its folder.

    Raises:
        UsageError: A later line has no tab, no text, or its file is missing or of another kind.
    """
    lines = (line for block in blocks_of(path) for line in block.splitlines())
    first: str | None = None
    for line in filter(str.strip, lines):
        name, text = (piece.strip() for piece in line.partition("\t")[::2])
        kind = str(mimetypes.guess_type(name)[0]).partition("/")[0]
        if first is None and ("\t" not in line or kind not in ("audio", "image")):
            return
        first = first or kind
        if kind != first or not words_of(text):
            raise UsageError(
                f"{path}: {line[:80]!r} is not an {first} file, a tab and a text",
                "Each line names a recording and what is said, or an image and a question.",
            )
        file = path.parent / Path(name).expanduser()
        if not file.is_file():
            raise UsageError(f"{path} names {name}, which is not there")
        yield Listed(file, "audio" if kind == "audio" else "image", text)


@dataclass(frozen=True)
class AnswerScorer(Scorer):
    """Puts the files of a list to the model.

    Attributes:
        processor: The checkpoint's.
        hooks: Of the model type.
        new_tokens: The most tokens of an answer or a transcript.
    """

    processor: Any
    hooks: Hooks
    new_tokens: int | None

    def measure(self, compiled: Compiled, sessions: Mapping[str, Session]) -> Measured:
        """Put all files to the model; as `Scorer.measure`."""
        rows: list[list[float]] = []
        others: list[WorstAnswer] = []
        speech = False
        for listed in islice(listed_in(self.text), self.most):
            self.progress(f"scoring on {compiled.backend}: file {len(rows) + 1}")
            expected = self._say(compiled, listed, self.reference)
            actual = self._say(compiled, listed, sessions)
            speech = listed.kind == "audio"
            given, ours, theirs = map(words_of, (listed.text, expected, actual))
            same = expected == actual
            wrong = [distance(given, ours), distance(given, theirs)]
            rows.append([len(given), *wrong, same, _begun_alike(ours, theirs)])
            if not same:
                others.append(WorstAnswer(listed.file.name, expected, actual, wrong[1] - wrong[0]))
        measures, intervals = _measures(np.array(rows), speech=speech)
        others.sort(key=lambda one: -one.more)
        said = f"{counted(len(rows), 'transcript' if speech else 'answer')} compared"
        return Measured(measures, intervals, tuple(others[: self.worst]), len(rows), said)

    def _say(self, compiled: Compiled, listed: Listed, sessions: Mapping[str, Session]) -> str:
        settings: dict[str, Any] = {}
        if generates(compiled.export):
            settings = {"do_sample": False}
            most = self.new_tokens or (_ANSWER if listed.kind == "image" else None)
            if most is not None:  # a model of sound has its own limit
                settings["max_new_tokens"] = most
        result = run_compiled(
            compiled,
            self.hooks,
            listed.request,
            processor=self.processor,
            settings=settings,
            sessions=sessions,
        )
        decoded = result.decoded
        (said,) = decoded["texts"] if isinstance(decoded, Mapping) else decoded
        return str(said).strip()


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _NOT_WORDS.sub(" ", text.lower()).split()


def distance(given: Sequence[str], said: Sequence[str]) -> int:
    """The least number of words to insert, delete or replace to make one text the other."""
    before = list(range(len(said) + 1))
    for row, word in enumerate(given, 1):
        now = [row]
        for column, other in enumerate(said, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


def _begun_alike(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The share of the first text's words before the first that the other has not."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    alike = next((n for n, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    return alike / len(ours) if ours else float(not theirs)


def _measures(
    rows: Any, *, speech: bool
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Measures, and where they are with 95% certainty, files resampled."""

    def of(sums: Any) -> dict[str, Any]:
        words, reference, candidate, same, alike = np.moveaxis(sums, -1, 0)
        rates = {
            "wer_reference": reference / words,
            "wer": candidate / words,
            "wer_more": (candidate - reference) / words,
        }
        count = len(rows)
        return {**(rates if speech else {}), "same": same / count, "alike": alike / count}

    share = np.full(len(rows), 1 / len(rows))
    draws = np.random.default_rng(0)
    often = draws.multinomial(len(rows), share, size=_DRAWS)
    bounds = {name: np.quantile(v, [0.025, 0.975]) for name, v in of(often @ rows).items()}
    intervals = {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
    measures = {name: float(value) for name, value in of(rows.sum(0)).items()}
    return measures, intervals if len(rows) > 1 else {}
