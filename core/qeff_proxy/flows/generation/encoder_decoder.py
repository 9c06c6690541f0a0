"""Generation by a model with an encoder: its parts run once, and each step takes their outputs.

transformers' generation code passes the encoder's output from step to step, and repeats and
reorders its rows for beams. Here these rows are numbers: a step takes the rows of the cross keys
and values that they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from qeff_proxy.arrays import Array, numpy_dtype, to_array
from qeff_proxy.errors import UsageError
from qeff_proxy.families.cross_attention import CROSS_MASK, CROSS_PADDING
from qeff_proxy.families.model_cache import LIBRARY_CACHE_NAME
from qeff_proxy.flows.attention_masks import build_mask, hide_padding
from qeff_proxy.flows.causal_engine import CausalEngine, Recorder
from qeff_proxy.flows.flow import Job
from qeff_proxy.flows.generation.generate import (
    Generated,
    ProxyForCausalLM,
    generation_config_with_pad,
    run_generation,
    settings_of,
)
from qeff_proxy.flows.generation.seeding import draws_seeded
from qeff_proxy.flows.generation.step_cache import StepCache
from qeff_proxy.load.load_model import most_positions
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session


class EncoderRun:
    """Runs an encoder's parts, and supplies the decoder's with rows of their outputs.

    A `qeff_proxy.flows.causal_engine.Supplier`.

    Args:
        parts: The encoder's parts, in order; their inputs are the outputs of earlier ones, masks,
            or named by whoever runs them.
        sessions: One per part, by name.
        recorder: Receives the inputs and outputs of each part.
    """

    def __init__(
        self,
        parts: Sequence[PartLike],
        sessions: Mapping[str, Session],
        recorder: Recorder | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.sessions = sessions
        self.recorder = recorder
        self.rows = 0
        self._outputs: dict[str, Array] = {}
        self._chosen: dict[str, Array] = {}

    def encode(
        self, tensors: Mapping[str, Array], padding: Array | None = None, step: int = 0
    ) -> int:
        """Run the encoder's parts.

        Args:
            tensors: The inputs that the caller has, by name.
            padding: ``[batch, sequence]`` int64, 1 for a token; ``None`` where nothing is padded.
            step: The number of the prefill that comes next, for the recorder.

        Returns:
            The number of rows.
        """
        known = dict(tensors)
        if padding is not None:
            known["padding_mask"] = padding
        for part in self.parts:
            masks = {mask.name: mask for mask in part.masks}
            feeds = {}
            for spec in part.inputs:
                if padding is not None and spec.name in masks:
                    mask, length = masks[spec.name], padding.shape[1]
                    known[spec.name] = build_mask(mask, padding, length, numpy_dtype(spec.dtype))
                feeds[spec.name] = known[spec.name].astype(numpy_dtype(spec.dtype), copy=False)
            outputs = self.sessions[part.name].run(feeds)
            if self.recorder is not None:
                self.recorder.step("prefill", step, part.name, feeds, outputs, past_length=0)
            known.update(outputs)
        last = self.parts[-1].outputs
        self._outputs = {spec.name: known[spec.name] for spec in last}
        rows, _, positions, _ = known[last[0].name].shape
        seen = np.ones((rows, positions), np.int64) if padding is None else padding
        self._outputs[CROSS_MASK] = hide_padding(seen, numpy_dtype(last[0].dtype))
        self._outputs[CROSS_PADDING] = seen
        self.rows = rows
        self._chosen = self._outputs
        return self.rows

    def numbers(self) -> BaseModelOutput:
        """What generation code passes on as the encoder's output: numbers ``[batch, 1, 1]``."""
        return BaseModelOutput(last_hidden_state=torch.arange(self.rows).float()[:, None, None])

    def choose(self, rows: Array) -> None:
        """Let the steps that follow take these rows ``[batch]`` int64, in this order."""
        self._chosen = self._outputs
        if not np.array_equal(rows, np.arange(self.rows)):
            self._chosen = {name: array[rows] for name, array in self._outputs.items()}

    def supply(
        self,
        part: PartLike,  # noqa: ARG002 (part of the protocol, as are the others)
        known: Mapping[str, Array],  # noqa: ARG002
        padding: Array,  # noqa: ARG002
    ) -> Mapping[str, Array]:
        """The cross keys and values, and the mask over the encoder's positions."""
        return self._chosen

    def chunk_end(self, start: int, stop: int) -> int:  # noqa: ARG002
        """A chunk may end anywhere."""
        return stop


class ProxyForSeq2SeqLM(ProxyForCausalLM):
    """An encoder-decoder whose forward pass runs sessions; `EncoderRun` is the engine's supplier.

    ``encoder_outputs`` are the numbers of its rows (`EncoderRun.numbers`).
    """

    def forward(  # type: ignore[override]
        self,
        decoder_input_ids: torch.Tensor,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """One pass of the generation loop.

        Args:
            decoder_input_ids: ``[batch, query]`` int64.
            encoder_outputs: The numbers of the encoder's rows, repeated and reordered.
            past_key_values: The cache; its own half is replaced by the longer one.
            cache: The same, as transformers names it since 5.24.

        Returns:
            ``logits [batch, 1, vocabulary]`` float32 of the last position, and the cache.
        """
        both = past_key_values if cache is None else cache
        assert both is not None  # noqa: S101 (`generate_from_encoder` passes it)
        choose_rows(self.engine, encoder_outputs)
        outputs = super().forward(decoder_input_ids, None, both.self_attention_cache)
        both.self_attention_cache = getattr(outputs, LIBRARY_CACHE_NAME)
        return Seq2SeqLMOutput(logits=outputs.logits, **{LIBRARY_CACHE_NAME: both})

    def _sample(self, *args: Any, **others: Any) -> Any:
        """As of a causal LM, without the padding of the encoder's texts."""
        choose_rows(self.engine, others["encoder_outputs"])
        return super()._sample(*args, **{**others, "attention_mask": None})


def choose_rows(engine: CausalEngine, encoder_outputs: Any) -> None:
    """Let the engine's steps take the rows of the encoder's outputs that generation code passes."""
    assert isinstance(engine.supplier, EncoderRun)  # noqa: S101 (as it was made)
    engine.supplier.choose(to_array(encoder_outputs[0].reshape(-1).to(torch.int64)))


def generate_from_encoder(
    job: Job,
    encoder: EncoderRun,
    parts: Sequence[PartLike],
    inputs: Mapping[str, torch.Tensor],
) -> Generated:
    """Generate token ids; the encoder has been run.

    Args:
        job: The run.
        encoder: Its outputs.
        parts: Those that run at each step.
        inputs: The encoder's input, for transformers' own processors, and ``decoder_input_ids
            [batch, tokens]`` where the user gave some.

    Returns:
        The tokens after those that the decoder started with, and the timings.

    Raises:
        UsageError: The tokens do not fit, or transformers refuses the settings.
    """
    context = job.options.ctx_len or most_positions(job.config)
    config = generation_config_with_pad(job)
    engine = CausalEngine(parts, job.sessions, context, encoder)
    chunk = job.options.prefill_seq_len
    model = ProxyForSeq2SeqLM(job.config, engine, config, chunk, job.recorder)
    beams = 1 if job.settings.get("num_beams") else config.num_beams or 1
    if job.recorder is not None and beams > 1:
        raise UsageError(
            f"the checkpoint asks for {beams} beams, which reorder the cache that a dump keeps",
            "Say num_beams (--num-beams): 1, or their number.",
        )
    length = _start_length(inputs, config, job.config)
    if config.max_new_tokens is None and config.max_length is not None:
        config.max_new_tokens, config.max_length = max(1, config.max_length - length), None
    settings = settings_of(job, length, config, context)
    with draws_seeded(settings.pop("seed", None)):
        return run_generation(
            model,
            {
                **inputs,
                "encoder_outputs": encoder.numbers(),
                LIBRARY_CACHE_NAME: EncoderDecoderCache(StepCache(), DynamicCache()),
            },
            settings,
        )


def _start_length(inputs: Mapping[str, torch.Tensor], generation: Any, config: Any) -> int:
    """The number of tokens that the decoder starts with: the user's, behind the start token."""
    start = inputs.get("decoder_input_ids")
    if start is None:
        return 1
    token = generation.decoder_start_token_id
    token = getattr(config, "decoder_start_token_id", None) if token is None else token
    token = generation.bos_token_id if token is None else token
    return start.shape[1] + int(token is not None and bool((start[:, 0] != token).all()))
