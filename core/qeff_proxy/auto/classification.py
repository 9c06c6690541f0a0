"""The faces of classifiers of texts and of their tokens, and of masked LMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qeff_proxy.auto.embedding import TextEncoder
from qeff_proxy.common.shown import ByName
from qeff_proxy.load.tasks import TASKS


@dataclass(frozen=True, repr=False)
class ClassificationResult(ByName):
    """What a classifier found; prints as its labels.

    Attributes:
        labels: The likeliest label of each text, or of each token of each text.
        scores: Of each text, or each token of it, label → score: a softmax over the labels; of a
            text, a sigmoid of each where several may hold or there is but one, or the logits
            themselves of a regression.
        logits: ``[texts, labels]`` float32, or a list of ``[tokens, labels]``.
        io_folder: Where the dump lies; ``None`` without ``write_io``.
    """

    labels: list[Any]
    scores: list[Any]
    logits: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]
    io_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {"labels": self.labels, "dump": self.io_folder}

    def __str__(self) -> str:
        return "\n".join(
            label if isinstance(label, str) else " ".join(label) for label in self.labels
        )


class QEFFAutoModelForSequenceClassification(TextEncoder):
    """A classifier of texts, or a reranker, which scores pairs of them."""

    task = TASKS["classification"]

    def generate(
        self,
        inputs: str | Sequence[str] | Mapping[str, Any],
        tokenizer: Any = None,
        *,
        pairs: Sequence[str] | None = None,
        batch_size: int | None = None,
        truncation: bool = False,
        progress: bool | None = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_tensors: str | Sequence[str] = ("*",),
        **runtime: Any,
    ) -> ClassificationResult:
        """Classify texts.

        Args:
            inputs: A text or several, or a tokenizer's output: ``input_ids`` and, where there is
                padding, ``attention_mask``, both ``[texts, sequence]``.
            tokenizer: By default the checkpoint's own.
            pairs: For each text, a second one: of a reranker, the document behind each query.
            batch_size: Texts that run together; by default the number compiled for.
            truncation: Cut a text that is too long, instead of raising an error.
            progress: Show a progress bar; by default on a terminal, for many texts.
            write_io: Dump inputs and outputs of every part.
            io_dir: Folder of the dump (implies ``write_io``).
            io_tensors: Which tensors to dump: a glob, or several.
            runtime: QEfficient's arguments (docs/qefficient.md): ``runtime_ai100=False`` runs on
                torch; those that mean nothing here are ignored with a warning.

        Raises:
            UsageError: There is no text, a text is too long, or an argument cannot be right.
        """
        result = self.run_texts(
            inputs,
            tokenizer,
            pairs=pairs,
            batch_size=batch_size,
            truncation=truncation,
            progress=progress,
            write_io=write_io,
            io_dir=io_dir,
            io_tensors=io_tensors,
            run=self.how_to_run(runtime),
        )
        labels, scores = (_each(result.decoded, name) for name in ("label", "scores"))
        return ClassificationResult(labels, scores, result.outputs["logits"], result.io_folder)


class QEFFAutoModelForTokenClassification(QEFFAutoModelForSequenceClassification):
    """A classifier of the tokens of texts, such as a recognizer of names."""

    task = TASKS["token-classification"]


class QEFFAutoModelForMaskedLM(QEFFAutoModelForSequenceClassification):
    """An encoder that guesses the masked tokens of texts, which are its labels.

    A text with one masked token has one label, and the scores of the five likeliest; with several,
    or with none, for which all its tokens count, it has lists of them.
    """

    task = TASKS["masked-lm"]


def _each(decoded: list[Any], name: str) -> list[Any]:
    """One value of each text, or a list of them for each text."""
    return [one[name] if isinstance(one, dict) else _each(one, name) for one in decoded]
