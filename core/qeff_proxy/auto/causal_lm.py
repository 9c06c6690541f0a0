"""The face of causal LMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qeff_proxy.auto.base import ProxyModel
from qeff_proxy.auto.qefficient import without_runtime
from qeff_proxy.common.arguments import processor, texts
from qeff_proxy.common.messages import type_named
from qeff_proxy.dump import DumpOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.request import Request

if TYPE_CHECKING:
    from qeff_proxy.flows.generation.generate import PerfMetrics


@dataclass(frozen=True)
class GenerationResult:
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

    @property
    def batch_size(self) -> int:
        """The number of generated rows."""
        return int(self.generated_ids.shape[0])


class _TextModel(ProxyModel):
    """The base class of both kinds of model that turn texts into texts."""

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
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
            prompts: A prompt or several; several are padded on the left, for an encoder on the
                right.
            tokenizer: By default the checkpoint's own.
            inputs: Token ids instead of prompts: ``input_ids`` and, where there is padding,
                ``attention_mask``, both ``[batch, sequence]``; with images, all outputs of the
                checkpoint's processor; with an encoder, ``decoder_input_ids [batch, tokens]`` are
                what its decoder starts with.
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
                ``temperature``, ``num_beams``, ``stop_strings``, ``eos_token_id`` …; and ``seed``.

        Raises:
            UsageError: The prompt is empty or too long, or an argument cannot be right.
        """
        prompt_list = check_prompts(prompts, inputs)
        return generate_text(
            self,
            Request(prompts=prompt_list, inputs=inputs),
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

    settings = without_runtime(settings)
    check_settings(settings)
    if settings["streamer"] is None:
        del settings["streamer"]
    if (settings.get("num_beams") or 1) > 1:
        # Beams reorder the cache between steps, so the rows that a step added are not known.
        dump = replace(dump, kv="full")
    result = face.run_request(
        request, tokenizer, settings, write_io=write_io, io_dir=io_dir, io_options=dump
    )
    return GenerationResult(
        result.outputs["generated_ids"],
        result.decoded,
        result.outputs["perf_metrics"],
        result.io_folder,
    )
