"""The face of encoders and embedding models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.common import arguments
from qeff_proxy.common.shown import ByName
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult

#: From this many texts on, a terminal shows a progress bar.
_MANY = 64


@dataclass(frozen=True, repr=False)
class EmbeddingResult(ByName):
    """The result of ``generate``; numpy converts it to its vectors.

    Attributes:
        embeddings: ``[texts, width]`` float32, in the order of the texts; without a pooling, a list
            of hidden states, ``[tokens, hidden]`` each.
        io_folder: The folder of the dump; ``None`` without ``write_io``.
    """

    embeddings: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]
    io_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        shapes = {" x ".join(map(str, np.shape(each))) for each in self.embeddings}
        return {
            "embeddings": f"{len(self.embeddings)} of {' or '.join(sorted(shapes))}",
            "dump": self.io_folder,
        }

    def __getitem__(self, name: str) -> Any:
        """A value by its name: QEfficient calls the embeddings ``output``.

        Raises:
            UsageError: The output is hidden states of texts of several lengths.
        """
        if name != "output":
            return super().__getitem__(name)
        if len({len(each) for each in self.embeddings}) > 1:
            raise UsageError(
                "the hidden states of texts of several lengths are no array", "Use .embeddings."
            )
        return np.stack(list(self.embeddings))

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """The vectors, ``[texts, width]``.

        Raises:
            UsageError: It holds hidden states, of texts of several lengths.
        """
        if isinstance(self.embeddings, list):
            raise UsageError(
                "without a pooling there is no vector of a text", "Load the model with pooling=."
            )
        return np.array(self.embeddings, dtype=dtype, copy=copy is not False)


class TextEncoder(ProxyModel):
    """The base class of models that run once on each text."""

    def run_texts(
        self,
        inputs: str | Sequence[str] | Mapping[str, Any],
        tokenizer: Any,
        *,
        batch_size: int | None,
        truncation: bool,
        progress: bool | None,
        write_io: bool,
        io_dir: str | Path | None,
        io_tensors: str | Sequence[str],
        pairs: Sequence[str] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Run texts, or a tokenizer's output; see the ``generate`` of the subclasses.

        Raises:
            UsageError: There is no text, a text is too long, or an argument cannot be right.
        """
        if batch_size is not None:
            arguments.whole_number("batch_size", batch_size)
        arguments.flag("truncation", truncation)
        tensors = inputs if isinstance(inputs, Mapping) else None
        texts: list[str] = []
        if tensors is None:
            texts = arguments.texts("inputs", inputs)
            if not texts:
                raise UsageError("there is no text", "Give at least one.")
        if arguments.processor("tokenizer", tokenizer) is None and tensors is None:
            tokenizer = self.processor()
        options: dict[str, Any] = {"truncation": truncation, "max_length": self._most_tokens()}
        if pairs is not None:
            options["pairs"] = arguments.texts("pairs", pairs)
            if len(options["pairs"]) != len(texts):
                raise UsageError(
                    f"there are {len(texts)} texts and {len(options['pairs'])} others to pair them "
                    "with",
                    "Give one for each.",
                )
        request = Request(prompts=texts, inputs=tensors, options=options)
        with _progress(len(texts), progress) as advance:
            return self.run_request(
                request,
                tokenizer,
                {"batch_size": batch_size, "progress": advance},
                write_io=write_io,
                io_dir=io_dir,
                io_options=DumpOptions("all", io_tensors),
                run=run,
            )

    def _most_tokens(self) -> int | None:
        """The most tokens of a text: as many as the model and the longest compiled length take."""
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None  # noqa: S101 (compile sets it)
        lengths = self._compiled.options.seq_len or ()
        most = self._compiled.export.settings.get("max_length")
        return min(filter(None, (most, max(lengths, default=None))), default=None)


class QEFFAutoModel(TextEncoder):
    """An encoder or embedding model.

    ``from_pretrained`` also takes ``pooling`` (``"mean"``, ``"cls"``, ``"max"``, ``"last"``,
    ``"none"``, or a function of ``last_hidden_state`` and ``attention_mask``), ``normalize`` and
    ``truncate_dim``. Without ``pooling``, the checkpoint's own is used, where it has one.
    """

    task = TASKS["embedding"]

    def generate(
        self,
        inputs: str | Sequence[str] | Mapping[str, Any],
        tokenizer: Any = None,
        *,
        batch_size: int | None = None,
        truncation: bool = False,
        progress: bool | None = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_tensors: str | Sequence[str] = ("*",),
        **runtime: Any,
    ) -> EmbeddingResult:
        """Embed texts.

        Args:
            inputs: A text or several, or a tokenizer's output: ``input_ids`` and, where there is
                padding, ``attention_mask``, both ``[texts, sequence]``.
            tokenizer: By default the checkpoint's own.
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
            batch_size=batch_size,
            truncation=truncation,
            progress=progress,
            write_io=write_io,
            io_dir=io_dir,
            io_tensors=io_tensors,
            run=self.how_to_run(runtime),
        )
        return EmbeddingResult(result.decoded, result.io_folder)


@contextmanager
def _progress(number: int, shown: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on the terminal; yields the function to advance it, or ``None``."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (shown or (shown is None and number >= _MANY and console.is_terminal)):
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("embedding", total=number)
        yield lambda done, total: bar.update(task, completed=done, total=total)
