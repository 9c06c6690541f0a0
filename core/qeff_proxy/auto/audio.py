"""The face of speech recognizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.auto.causal_lm import new_tokens, without_runtime
from qeff_proxy.common import arguments
from qeff_proxy.common.shown import ByName
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult

if TYPE_CHECKING:
    from qeff_proxy.flows.generation.generate import PerfMetrics


@dataclass(frozen=True, repr=False)
class Transcript(ByName):
    """What a CTC model heard; prints as its text.

    Attributes:
        texts: One transcript per sound.
        predicted_ids: Of each sound the best token id of each frame, int64.
        logits: Of each sound ``[frames, vocabulary]`` float32.
        io_folder: Where the dump lies; ``None`` without ``write_io``.
    """

    texts: list[str]
    predicted_ids: list[npt.NDArray[np.int64]]
    logits: list[npt.NDArray[np.float32]]
    io_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {"texts": self.texts, "dump": self.io_folder}

    def __str__(self) -> str:
        return "\n".join(self.texts)


@dataclass(frozen=True, repr=False)
class SpeechResult(ByName):
    """What an encoder and decoder heard; prints as its text.

    Attributes:
        generated_ids: Token ids, ``[sounds, tokens]`` int64, filled up with the pad token.
        texts: One transcript per sound; ``None`` without a processor.
        segments: Of each sound, where timestamps were asked for, its pieces: ``start`` and ``end``
            in seconds, and ``text``.
        perf_metrics: How long it took.
        io_folder: Where the dump lies; ``None`` without ``write_io``.
    """

    generated_ids: npt.NDArray[np.int64]
    texts: list[str] | None
    segments: list[list[dict[str, Any]]] | None
    perf_metrics: PerfMetrics
    io_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {"texts": self.texts or self.generated_ids.tolist(), "dump": self.io_folder}

    def __str__(self) -> str:
        return "\n".join(self.texts) if self.texts is not None else str(self.generated_ids)


class _Recognizer(ProxyModel):
    """The base class of both kinds of speech recognizer."""

    def _recognize(
        self,
        inputs: Any,
        processor: Any,
        settings: Mapping[str, Any],
        *,
        sampling_rate: int | None,
        write_io: bool,
        io_dir: str | Path | None,
        io_options: DumpOptions,
        run: Mapping[str, Any],
        prompts: Sequence[str] = (),
    ) -> RunResult:
        tensors = inputs if _is_tensors(inputs) else None
        sounds = [] if tensors is not None else _sounds(inputs)
        if arguments.processor("processor", processor) is None:
            processor = self._own_processor(needed=tensors is None)
        return self.run_request(
            Request(
                prompts=prompts,
                audio=sounds,
                inputs=tensors,
                options={**settings, "sampling_rate": sampling_rate},
            ),
            processor,
            settings,
            write_io=write_io,
            io_dir=io_dir,
            io_options=io_options,
            run=run,
        )

    def _own_processor(self, *, needed: bool) -> Any:
        """The checkpoint's processor; optional where the input is tensors, and the output ids."""
        try:
            return self.processor()
        except (CheckpointError, UsageError):
            if needed:
                raise
            return None


class QEFFAutoModelForCTC(_Recognizer):
    """A speech recognizer with a CTC head."""

    task = TASKS["ctc"]

    def generate(
        self,
        processor: Any = None,
        inputs: Any = None,
        *,
        sampling_rate: int | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: float | None = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_tensors: str | Sequence[str] = ("*",),
        **runtime: Any,
    ) -> Transcript:
        """Transcribe.

        Args:
            processor: By default the checkpoint's own.
            inputs: A sound or a list of them (a path, ``[samples]``, or a mapping with ``array``
                and ``sampling_rate``), or the processor's output (``input_values``).
            sampling_rate: Of arrays, in Hz; by default the rate the model needs.
            chunk_length_s: Longer sounds run in windows of this many seconds (default 30).
            stride_length_s: Overlap of the windows at each end, in seconds (default 5).
            write_io: Dump inputs and outputs of every part.
            io_dir: Folder of the dump (implies ``write_io``).
            io_tensors: Which tensors to dump: a glob, or several.
            runtime: QEfficient's arguments (docs/qefficient.md): ``runtime_ai100=False`` runs on
                torch; those that mean nothing here are ignored with a warning.

        Raises:
            UsageError: There is no sound, a sound is empty, or an argument is wrong.
        """
        result = self._recognize(
            inputs,
            processor,
            {"chunk_length_s": chunk_length_s, "stride_length_s": stride_length_s},
            sampling_rate=sampling_rate,
            write_io=write_io,
            io_dir=io_dir,
            io_options=DumpOptions("all", io_tensors),
            run=self.how_to_run(runtime),
        )
        outputs = result.outputs
        return Transcript(
            result.decoded or [], outputs["predicted_ids"], outputs["logits"], result.io_folder
        )


class QEFFAutoModelForSpeechSeq2Seq(_Recognizer):
    """A speech recognizer with encoder and decoder."""

    task = TASKS["speech"]

    def generate(
        self,
        inputs: Any = None,
        processor: Any = None,
        *,
        prompts: str | Sequence[str] | None = None,
        generation_len: int | None = None,
        max_new_tokens: int | None = None,
        language: str | None = None,
        task: Literal["transcribe", "translate"] | None = None,
        return_timestamps: bool | None = None,
        sampling_rate: int | None = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_steps: str = "all",
        io_tensors: str | Sequence[str] = ("*",),
        kv: Literal["delta", "full"] = "delta",
        **settings: Any,
    ) -> SpeechResult:
        """Transcribe or translate.

        Args:
            inputs: A sound or a list of them (a path, ``[samples]``, or a mapping with ``array``
                and ``sampling_rate``), or the processor's output (``input_features``).
            processor: By default the checkpoint's own. A number here is ``generation_len``.
            prompts: What to do with the sounds, for a model that takes sounds among the tokens of a
                text; without any it transcribes each sound.
            generation_len: New tokens; the same as ``max_new_tokens``.
            max_new_tokens: New tokens of each window; by default the checkpoint's number.
            language: Of the speech; by default the model detects it.
            task: By default ``"transcribe"``.
            return_timestamps: Return when each piece was spoken; long sounds always use timestamps
                internally.
            sampling_rate: Of arrays, in Hz; by default the rate the model needs.
            write_io: Dump inputs and outputs of every part at every step.
            io_dir: Folder of the dump (implies ``write_io``).
            io_steps: Which steps to dump: `qeff_proxy.dump.DumpOptions`.
            io_tensors: Which tensors to dump: a glob, or several.
            kv: ``"delta"`` dumps the cache rows that a step added, ``"full"`` the whole cache.
            settings: Further arguments of transformers' ``generate``, and QEfficient's
                (docs/qefficient.md).

        Raises:
            UsageError: There is no sound, a sound is empty, or an argument is wrong.
        """
        from qeff_proxy.flows.generation.settings import check_settings

        if type(processor) is int:
            processor, generation_len = None, processor
        settings = without_runtime(settings, self.generate)
        run = {name: settings.pop(name) for name in self.how & set(settings)}
        asked = {
            "max_new_tokens": new_tokens(generation_len, max_new_tokens),
            "language": language,
            "task": task,
            "return_timestamps": return_timestamps,
            **settings,
        }
        check_settings(asked)
        beams = settings.get("num_beams") or 1
        result = self._recognize(
            inputs,
            processor,
            {name: value for name, value in asked.items() if value is not None},
            sampling_rate=sampling_rate,
            write_io=write_io,
            io_dir=io_dir,
            # Beams reorder the cache between steps, so the rows that a step added are not known.
            io_options=DumpOptions(io_steps, io_tensors, "full" if beams > 1 else kv),
            run=run,
            prompts=[] if prompts is None else arguments.texts("prompts", prompts),
        )
        outputs = result.outputs
        decoded = result.decoded or {}
        if isinstance(decoded, list):
            decoded = {"texts": decoded}
        return SpeechResult(
            outputs["generated_ids"],
            decoded.get("texts"),
            decoded.get("segments"),
            outputs["perf_metrics"],
            result.io_folder,
        )


def _is_tensors(inputs: Any) -> bool:
    """Whether ``inputs`` is a processor's output, and not a sound with its rate."""
    return isinstance(inputs, Mapping) and not {"array", "path"} & set(inputs)


def _sounds(inputs: Any) -> list[Any]:
    """One sound or several, as a list."""
    if inputs is None:
        raise UsageError("there is no sound", "Give inputs=: a path, samples, or a list of those.")
    if not isinstance(inputs, list | tuple):
        return [inputs]
    if not inputs:
        raise UsageError("there is no sound to transcribe", "Give at least one.")
    # A list of numbers is one sound.
    return [inputs] if isinstance(inputs[0], int | float) else list(inputs)
