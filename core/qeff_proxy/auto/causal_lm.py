"""The face of causal LMs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.auto.qefficient import GENERATE, without_ignored
from qeff_proxy.common.arguments import flag, processor, texts
from qeff_proxy.common.messages import first_line, type_named
from qeff_proxy.common.shown import ByName
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult

if TYPE_CHECKING:
    from qeff_proxy.flows.generation.generate import PerfMetrics


@dataclass(frozen=True, repr=False)
class GenerationResult(ByName):
    """The result of ``generate``.

    Attributes:
        generated_ids: New token ids, ``[rows, tokens]`` int64; rows that ended early are padded
            with the pad token.
        generated_texts: Their texts, one per row; ``None`` without a tokenizer.
        perf_metrics: The timings.
        io_folder: The folder of the dump; ``None`` without ``write_io``.
    """

    generated_ids: npt.NDArray[np.int64]
    generated_texts: list[str] | None
    perf_metrics: PerfMetrics
    io_folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        ids, speed = self.generated_ids, self.perf_metrics
        return {
            "texts": self.generated_texts,
            "tokens": " x ".join(map(str, ids.shape)),
            "first after": f"{speed.prefill_time:.3f} s",
            "then": f"{speed.decode_perf:.1f} tokens/s",
            "dump": self.io_folder,
        }

    @classmethod
    def of(cls, result: RunResult) -> Self:
        """The result of a run that generates text."""
        outputs = result.outputs
        return cls(
            outputs["generated_ids"], result.decoded, outputs["perf_metrics"], result.io_folder
        )

    @property
    def batch_size(self) -> int:
        """The number of generated rows."""
        return int(self.generated_ids.shape[0])


class _TextModel(ProxyModel):
    """The base class of both kinds of model that turn texts into texts."""

    def generate(
        self,
        first: str | Sequence[str] | Any = None,
        second: Any = None,
        /,
        *,
        prompts: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        prompts_txt_file_path: str | Path | None = None,
        inputs: Mapping[str, Any] | None = None,
        audio: Any = None,
        generation_len: int | None = None,
        max_new_tokens: int | None = None,
        streamer: Any = None,
        write_io: bool = False,
        io_dir: str | Path | None = None,
        io_steps: str = "all",
        io_tensors: str | Sequence[str] = ("*",),
        kv: Literal["delta", "full"] = "delta",
        **settings: Any,
    ) -> GenerationResult:
        """Generate text.

        Args:
            first: The prompts, or the tokenizer, which QEfficient has first.
            second: The other one of them.
            prompts: A prompt or several; several are padded on the left, for an encoder on the
                right.
            tokenizer: By default the checkpoint's own.
            prompts_txt_file_path: Instead of prompts, a text file with one on each line.
            inputs: Token ids instead of prompts: ``input_ids`` and, where there is padding,
                ``attention_mask``, both ``[batch, sequence]``; with images, all outputs of the
                checkpoint's processor; with an encoder, ``decoder_input_ids [batch, tokens]`` are
                what its decoder starts with.
            audio: For the prompts of a model that takes sounds: as the images of
                `QEFFAutoModelForImageTextToText`, of paths or samples.
            generation_len: New tokens; the same as ``max_new_tokens``.
            max_new_tokens: New tokens; by default the checkpoint's number, else 128, but never
                more than fit.
            streamer: A transformers streamer.
            write_io: Dump inputs and outputs of every part at every step.
            io_dir: Folder of the dump (implies ``write_io``).
            io_steps: Which steps to dump: `qeff_proxy.dump.DumpOptions`.
            io_tensors: Which tensors to dump: a glob, or several.
            kv: ``"delta"`` dumps the cache rows that a step added, ``"full"`` the whole cache.
            settings: Further arguments of transformers' ``generate``: ``do_sample``,
                ``temperature``, ``num_beams``, ``stop_strings``, ``eos_token_id`` …; ``seed``; the
                inputs by name (``**inputs``); and QEfficient's (docs/qefficient.md):
                ``stream=True`` prints the text of one prompt, ``runtime_ai100=False`` runs on
                torch.

        Raises:
            UsageError: The prompt is empty or too long, or an argument cannot be right.
        """
        inputs, settings = inputs_and_settings(self, inputs, settings)
        for value in (first, second):
            is_text = isinstance(value, str | list | tuple)
            if value is not None and (prompts if is_text else tokenizer) is not None:
                raise UsageError(
                    f"there are two {'prompts' if is_text else 'tokenizer'} arguments",
                    "Give prompts and tokenizer once each.",
                )
            prompts, tokenizer = (value, tokenizer) if is_text else (prompts, value or tokenizer)
        if prompts_txt_file_path is not None:
            prompts = prompts_of_file(prompts_txt_file_path, prompts)
        prompt_list = check_prompts(prompts, inputs)
        return generate_text(
            self,
            Request(prompts=prompt_list, audio=as_list(audio), inputs=inputs),
            self.processor()
            if prompt_list and tokenizer is None
            else processor("tokenizer", tokenizer),
            {
                **settings,
                "max_new_tokens": new_tokens(generation_len, max_new_tokens),
                "streamer": streamer,
            },
            DumpOptions(io_steps, io_tensors, kv),
            io_dir=io_dir,
            write_io=write_io,
        )


class QEFFAutoModelForCausalLM(_TextModel):
    """A causal LM, or a vision-language model registered as one, which takes ``inputs``."""

    task = TASKS["text"]


class QEFFAutoModelForSeq2SeqLM(_TextModel):
    """An encoder-decoder of texts, such as T5, BART or Marian.

    The ``generated_ids`` of its results leave out the tokens that the decoder started with.
    """

    task = TASKS["seq2seq"]


def as_list(value: Any) -> list[Any]:
    """One image or sound, or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def prompts_of_file(path: str | Path, others: Any = None) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UsageError: It cannot be read, has no text, or there are other prompts.
    """
    if others is not None:
        raise UsageError("give either prompts or prompts_txt_file_path")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(
            f"prompts_txt_file_path {path!r} cannot be read: {first_line(error)}",
            "Name a text file with a prompt on each line.",
        ) from error
    if not any(lines):
        raise UsageError(f"{path} has no prompt", "Write one on each line.")
    return [line for line in lines if line]


def check_prompts(
    prompts: str | Sequence[str] | None, inputs: Mapping[str, Any] | None
) -> list[str]:
    """The prompts as a list; empty where the user passed inputs instead.

    Raises:
        UsageError: There are neither, or both, or the inputs have no names.
    """
    prompt_list = [] if prompts is None else texts("prompts", prompts)
    if (not prompt_list) == (inputs is None):
        raise UsageError("give either prompts or inputs, and not an empty list of them")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise UsageError(
            f"inputs are {type_named(inputs)}", "Give tensors by name, as a processor does."
        )
    return prompt_list


def new_tokens(generation_len: int | None, max_new_tokens: int | None) -> int | None:
    """QEfficient's ``generation_len``, or transformers' ``max_new_tokens``.

    Raises:
        UsageError: Both are given.
    """
    if generation_len is not None and max_new_tokens is not None:
        raise UsageError("generation_len and max_new_tokens say the same; give one of them")
    return max_new_tokens if generation_len is None else generation_len


def generate_text(
    face: ProxyModel,
    request: Request,
    tokenizer: Any,
    settings: Mapping[str, Any],
    dump: DumpOptions,
    *,
    io_dir: str | Path | None,
    write_io: bool,
) -> GenerationResult:
    """Run a request that generates text, from text or from images.

    Args:
        face: The model.
        request: The user's input.
        tokenizer: Encodes the prompts and decodes the tokens.
        settings: Arguments of transformers' ``generate``, with ``max_new_tokens`` and ``streamer``,
            which may be ``None``.
        dump: Which steps and tensors to dump.
        io_dir: Folder of the dump (implies ``write_io``).
        write_io: Whether to dump.
    """
    from qeff_proxy.flows.generation.settings import check_settings

    settings = dict(settings)
    run = {name: settings.pop(name) for name in face.how & set(settings)}
    if flag("stream", settings.pop("stream", False)) and settings["streamer"] is None:
        settings["streamer"] = printer(request, tokenizer)
    check_settings(settings)
    if settings["streamer"] is None:
        del settings["streamer"]
    if (settings.get("num_beams") or 1) > 1:
        # Beams reorder the cache between steps, so the rows that a step added are not known.
        dump = replace(dump, kv="full")
    result = face.run_request(
        request, tokenizer, settings, write_io=write_io, io_dir=io_dir, io_options=dump, run=run
    )
    return GenerationResult.of(result)


def inputs_and_settings(
    face: ProxyModel, inputs: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """Inputs and settings of a ``generate`` that was perhaps called with ``**inputs``.

    Returns:
        The inputs without padding behind them, and what `without_runtime` leaves of the others.
    """
    settings = dict(settings)
    if inputs is None and "input_ids" in settings:
        names = [name for name, value in settings.items() if hasattr(value, "ndim")]
        inputs = {name: settings.pop(name) for name in {"input_ids", *names}}
    method = face.generate  # type: ignore[attr-defined]
    return _trimmed(inputs), without_runtime(settings, method, understood=face.how)


def _trimmed(inputs: Any) -> Any:
    """The inputs without the last positions, if these are padding in every row.

    QEfficient's scripts pad on the right, to the length of a prefill chunk.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or getattr(mask, "ndim", 0) != 2 or getattr(mask, "is_meta", False):
        return inputs
    length = int(np.flatnonzero(np.asarray(mask).any(axis=0)).max(initial=-1)) + 1
    alike = {name for name, each in inputs.items() if getattr(each, "shape", None) == mask.shape}
    if length in {0, mask.shape[1]} or "input_ids" not in alike:
        return inputs
    return {name: each[:, :length] if name in alike else each for name, each in inputs.items()}


def without_runtime(
    settings: Mapping[str, Any], method: Callable[..., Any], *, understood: Collection[str] = ()
) -> dict[str, Any]:
    """Settings of transformers' ``generate``, and what is obeyed of QEfficient's.

    Args:
        settings: What the user gave besides the parameters of ``method``.
        method: The ``generate`` of a class here.
        understood: Others that are obeyed.
    """
    from transformers import GenerationConfig, GenerationMixin

    known = {*GenerationConfig().to_dict(), *signature(GenerationMixin.generate).parameters}
    known = (known - {"kwargs"}) | set(understood)
    return without_ignored(settings, GENERATE, method, understood=known)


def printer(request: Request, tokenizer: Any) -> Any:
    """A streamer that prints the text of one prompt as it is generated."""
    if len(request.prompts) != 1 or tokenizer is None:
        raise UsageError("stream prints the text of one prompt", "Give one, or leave stream out.")
    from transformers import TextStreamer

    return TextStreamer(getattr(tokenizer, "tokenizer", tokenizer), skip_special_tokens=True)
