"""Generate: transformers' own generation loop over the parts' sessions.

Sampling, beams, logits processors and stop strings are transformers' code. Ours are the forward
pass, which runs the parts through `qeff_proxy.flows.causal_engine.CausalEngine`, and a faster loop
for greedy search (`qeff_proxy.flows.generation.greedy`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.families.model_cache import LIBRARY_CACHE_NAME
from qeff_proxy.families.rotary import rotary_limits
from qeff_proxy.flows.causal_engine import CausalEngine, Recorder, StepId, Supplier
from qeff_proxy.flows.flow import Job
from qeff_proxy.flows.generation.greedy import Rules, search_greedily
from qeff_proxy.flows.generation.inputs import checked_ids, checked_mask
from qeff_proxy.flows.generation.seeding import draws_seeded
from qeff_proxy.flows.generation.settings import check_settings, generation_config_of
from qeff_proxy.flows.generation.step_cache import StepCache
from qeff_proxy.load.load_model import most_positions
from qeff_proxy.request import refuse_unused
from qeff_proxy.session.cache_buffers import Cache
from qeff_proxy.session.part_like import PartLike

#: New tokens where neither the user nor the checkpoint gives a number.
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class PerfMetrics:
    """The timings of a run.

    Attributes:
        prefill_time: Seconds from the start to the first token (time to first token).
        decode_perf: Tokens per second and prompt after the first one; 0.0 where there is none.
        total_perf: Tokens per second over all prompts and the whole time.
        total_time: Seconds.
    """

    prefill_time: float
    decode_perf: float
    total_perf: float
    total_time: float

    def to_json(self) -> dict[str, float]:
        """The figures as a JSON object."""
        return dict(vars(self))


class ProxyForCausalLM(nn.Module, GenerationMixin):  # type: ignore[misc]
    """A causal LM whose forward pass runs sessions.

    Args:
        config: Of the uncut model.
        engine: Runs the parts.
        generation_config: The checkpoint's generation settings.
        prefill_seq_len: Prompts are run in chunks of this many tokens; ``None``: at once.
        recorder: Receives the inputs and outputs of every run of every part.
    """

    main_input_name = "input_ids"
    base_model_prefix = "proxy"
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        config: PreTrainedConfig,
        engine: CausalEngine,
        generation_config: GenerationConfig | None = None,
        prefill_seq_len: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.engine = engine
        self.prefill_seq_len = prefill_seq_len
        self.recorder = recorder
        self.step_times: list[float] = []
        #: Tokens of each row before the first new one, known once a pass was run.
        self.start_length = 0
        self._chunks = 0
        self._decode_steps = 0

    @property
    def device(self) -> torch.device:
        """The device of token ids and logits: the host."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits that the generation loop sees."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """True."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: this class is not a checkpoint's own code."""
        return False

    def get_experts_implementation(self) -> None:
        """None: experts are inside the body."""
        return

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the generation loop: a prefill, in chunks, or a decode step.

        Args:
            input_ids: ``[batch, query]`` int64.
            attention_mask: ``[batch, past + query]``, 1 for a token; ``None`` for no padding.
            past_key_values: The cache; it is replaced by the longer one.
            cache: The same, as transformers names it since 5.24.

        Returns:
            ``logits [batch, 1, vocabulary]`` float32 of the last position, and the cache.
        """
        ids = to_array(input_ids)
        held = StepCache.of(past_key_values if cache is None else cache)
        past = held.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.int64)
        padding = to_array(attention_mask.to(torch.int64))
        logits, longer = self.run(ids, padding, held.arrays() if past else None)
        held.hold(longer, padding.shape[1])
        return CausalLMOutputWithPast(
            logits=to_tensor(logits).float(), **{LIBRARY_CACHE_NAME: held}
        )

    def run(self, ids: Array, padding: Array, cache: Cache | None) -> tuple[Array, Cache]:
        """Run the parts on new tokens; without a cache that is a prefill, in chunks.

        Args:
            ids: ``[batch, query]`` int64.
            padding: ``[batch, past + query]`` int64, 1 for a token and 0 for padding.
            cache: From the run before, or ``None``.

        Returns:
            ``logits [batch, 1, vocabulary]`` of the last position, and the longer cache.

        Raises:
            BackendError: A logit is not finite.
        """
        length = ids.shape[1]
        past = padding.shape[1] - length
        self.start_length = self.start_length or length
        chunk = self.prefill_seq_len if cache is None and self.prefill_seq_len else length
        chunk = min(chunk, self.engine.longest_step or chunk)
        decoding = cache is not None
        logits = None
        stop = 0
        while stop < length:
            start, stop = stop, min(stop + chunk, length)
            if self.engine.has_states and self.prefill_seq_len and stop - start < chunk:
                stop = start + 1  # a fixed shape would pad it, and the states would see that
            if not decoding and self.engine.supplier is not None:
                stop = min(self.engine.supplier.chunk_end(start, stop), length)
            logits, cache = self.engine.step(
                self._next_step(decoding=decoding),
                ids[:, start:stop],
                padding[:, : past + stop],
                cache,
                last_only=True,
                recorder=self.recorder,
            )
        assert logits is not None and cache is not None  # noqa: S101, PT018 (the loop runs at least once)
        numbers = logits.astype(np.float32, copy=False)
        if not (np.isfinite(numbers.min()) and np.isfinite(numbers.max())):  # NaN is either, too
            raise BackendError(
                f"the logits of step {len(self.step_times)} are not finite numbers",
                "Check the weights for NaN, or run in float32 if a half-precision run overflows.",
            )
        self.step_times.append(time.perf_counter())
        return logits, cache

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> Any:
        """Replace transformers' loop for greedy search (`qeff_proxy.flows.generation.greedy`)."""
        if generation_config.do_sample or generation_config.return_dict_in_generate:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, **others
            )
        return search_greedily(
            self.run,
            input_ids,
            others.get("attention_mask"),
            Rules(logits_processor, stopping_criteria, generation_config, others.get("streamer")),
        )

    def _next_step(self, *, decoding: bool) -> StepId:
        if decoding:
            self._decode_steps += 1
            return StepId("decode", self._decode_steps - 1)
        self._chunks += 1
        return StepId("prefill", self._chunks - 1)


@dataclass(frozen=True)
class Generated:
    """The new ids, ``[prompts, tokens]``, and the timings."""

    ids: npt.NDArray[np.int64]
    perf: PerfMetrics


def generate_ids(
    job: Job, parts: Sequence[PartLike] | None = None, supplier: Supplier | None = None
) -> Generated:
    """Generate token ids from a compiled causal LM.

    Args:
        job: The run.
        parts: The parts that run at each step; by default all.
        supplier: Supplies tensors that no part computes.

    Raises:
        UsageError: The export is a stub, or the prompt does not fit into the context.
    """
    if job.export.kind == "stub":
        raise UsageError(
            "a stub's outputs mean nothing, so no text can be generated from it",
            "Export with proxy='split' to generate.",
        )
    check_settings(job.settings)
    text_config = job.config.get_text_config(decoder=True)
    context = job.options.ctx_len or most_positions(job.config)
    parts = parts or job.export.parts
    engine = CausalEngine(parts, job.sessions, context, supplier, job.export.adapter)
    model = ProxyForCausalLM(
        job.config,
        engine,
        generation_config_with_pad(job),
        prefill_seq_len=job.options.prefill_seq_len,
        recorder=job.recorder,
    )
    if supplier is None:
        refuse_unused(job.tensors, ("input_ids", "attention_mask"))
    ids = checked_ids(job.tensors, job.export.settings.get("embedding_rows"))
    mask = checked_mask(job.tensors, ids)
    settings = settings_of(job, ids.shape[1], model.generation_config, context)
    _check_rotary_limit(model, text_config, ids.shape[1], settings["max_new_tokens"])
    inputs = {"input_ids": ids, "attention_mask": mask, LIBRARY_CACHE_NAME: StepCache()}
    with draws_seeded(settings.pop("seed", None)):
        return run_generation(model, inputs, settings)


def settings_of(
    job: Job, length: int, config: GenerationConfig, context: int | None
) -> dict[str, Any]:
    """The arguments of transformers' ``generate`` for a run, and ``seed``.

    Args:
        job: The run.
        length: The number of tokens that are there before the first new one.
        config: The generation config of the run.
        context: Most positions that fit, or ``None`` for no limit.

    Raises:
        UsageError: The tokens do not fit.
    """
    settings = {n: v for n, v in job.settings.items() if n != "generation_config"}
    own = job.settings.get("generation_config")
    if own is not None and own.max_new_tokens is None:
        settings.setdefault("max_length", own.max_length)
    if settings.get("max_length") is not None and settings.get("max_new_tokens") is None:
        settings["max_new_tokens"] = settings.pop("max_length") - length
    settings["max_new_tokens"] = _new_tokens(settings, config, length, context)
    if (settings.get("stop_strings") or config.stop_strings) is not None:
        settings["tokenizer"] = getattr(job.processor, "tokenizer", job.processor)
    return settings


def _check_rotary_limit(
    model: ProxyForCausalLM, config: PreTrainedConfig, length: int, new: int
) -> None:
    """Refuse to cross the position where LongRoPE switches to its long factors.

    transformers runs a longer prompt with the long factors throughout, and recomputes the whole
    cache when generation crosses that position.
    """
    for rope, limit in rotary_limits(config):
        if length > limit:
            model.prefill_seq_len = None  # each chunk would have frequencies of its own
        elif rope["rope_type"] == "longrope" and length + new > limit + 1:
            raise UsageError(
                f"{length} prompt tokens and {new} new ones cross position {limit}, where this "
                "model changes its rotary factors and its whole cache",
                f"Generate at most {limit + 1 - length} tokens, or start with a longer prompt.",
            )


def generation_config_with_pad(job: Job) -> GenerationConfig:
    """The settings of a run, with a pad token where they have none."""
    config = generation_config_of(job)
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else (0 if end is None else end)
    return config


def _new_tokens(
    settings: dict[str, Any], config: GenerationConfig, length: int, context: int | None
) -> int:
    """The number of tokens to generate; a default is cut to the context."""
    asked: int | None = settings.pop("max_new_tokens", None)
    if context is not None and length + (asked or 1) > context + 1:
        new = f" and {asked} new ones" if asked else ""
        raise UsageError(
            f"{length} prompt tokens{new} do not fit into a context of {context}",
            "Shorten the prompt, generate fewer tokens, or compile with a larger ctx_len.",
        )
    if asked is not None:
        return asked
    room = context + 1 - length if context is not None else DEFAULT_NEW_TOKENS
    return max(1, min(config.max_new_tokens or DEFAULT_NEW_TOKENS, room))


def run_generation(
    model: ProxyForCausalLM, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> Generated:
    """Run transformers' generation loop.

    Args:
        model: The sessions, as a model.
        inputs: The inputs of transformers' ``generate``, among them the cache.
        settings: Its other arguments: ``max_new_tokens``, ``do_sample``, ``num_beams``,
            ``streamer``, ``stop_strings`` …

    Raises:
        UsageError: transformers refuses the settings.
    """
    start = time.perf_counter()
    try:
        generate: Any = model.generate  # typed as a submodule, since transformers is untyped
        output = generate(use_cache=True, **inputs, **settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"transformers refuses to generate: {error}") from error
    end = time.perf_counter()
    new = output[:, model.start_length :]
    steps = model.step_times
    decode_time = steps[-1] - steps[0] if len(steps) > 1 else 0.0
    perf = PerfMetrics(
        prefill_time=steps[0] - start,
        decode_perf=(len(steps) - 1) / decode_time if decode_time else 0.0,
        total_perf=new.numel() / (end - start),
        total_time=end - start,
    )
    return Generated(cast("Any", new.numpy()), perf)
