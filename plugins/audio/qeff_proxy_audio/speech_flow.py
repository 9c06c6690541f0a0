"""The ``speech-seq2seq`` flow: transformers' Whisper generation on the parts' sessions.

transformers handles language and task tokens, timestamps, windows of long sounds, fallbacks and
beams. `ProxyWhisper` replaces the forward pass: it runs the encoder part once per window and the
decoder's parts with `qeff_proxy.flows.causal_engine.CausalEngine`. Other recognizers than Whisper
run as `qeff_proxy_audio.any_speech` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.quiet import quiet_logs
from qeff_proxy.errors import UsageError
from qeff_proxy.families.model_cache import LIBRARY_CACHE_NAME
from qeff_proxy.flows.causal_engine import CausalEngine, StepId, position_ids_of
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.flows.generation.encoder_decoder import EncoderRun
from qeff_proxy.flows.generation.generate import PerfMetrics
from qeff_proxy.flows.generation.inputs import checked_ids
from qeff_proxy.flows.generation.seeding import draws_seeded
from qeff_proxy.flows.generation.settings import check_settings, generation_config_of
from qeff_proxy.flows.generation.step_cache import arrays_of_cache, fill_cache
from qeff_proxy.parts import Proxy
from qeff_proxy.request import Request
from qeff_proxy.session.cache_buffers import Cache
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import (
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from qeff_proxy_audio.any_speech import (
    example_sound,
    logits_of_model_and_parts,
    run_sounds,
)
from qeff_proxy_audio.sound import EXAMPLE, feature_extractor_of, load_sound

__all__ = ["ProxyWhisper", "SpeechFlow"]

_STEPS = (5, 2, 1)  # queries of the prefill, a second chunk, a decode step
_PADDING = 2  # padded positions before the second row


class SpeechFlow:
    """An encoder pass per window or sound, then prefill and decode steps."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the logits of the parts, step by step, with one pass of the model.

        Raises:
            CutError: They differ, or the parts cannot be run.
        """
        if "frames" not in proxy.settings:
            with parts_must_run(model, sites):
                pair = logits_of_model_and_parts(model, proxy)
            return check_equal(model, sites, *pair, np.ones(pair[0].shape[:2]), output="logit")
        generator = np.random.default_rng(0)
        spec = proxy.parts[0].inputs[0]
        features = generator.standard_normal((2, *map(int, spec.shape[1:]))).astype(np.float32)
        rows = model.get_input_embeddings().weight.shape[0]
        ids = generator.integers(0, rows, (2, sum(_STEPS)))
        padding = np.ones_like(ids)
        padding[1, :_PADDING] = 0
        with torch.no_grad():
            outputs = model(
                input_features=to_tensor(features).to(model.dtype),
                decoder_input_ids=to_tensor(ids),
                decoder_attention_mask=to_tensor(padding),
                decoder_position_ids=to_tensor(position_ids_of(padding, ids.shape[1])),
                use_cache=False,
            )
        expected = to_array(outputs.logits.float())
        with parts_must_run(model, sites):
            actual = _proxy_logits(proxy, features, ids, padding)
        return check_equal(model, sites, expected, actual, padding, output="logit")

    def example_request(
        self,
        export: Export,
        processor: Any,
        proxy: Callable[[], Proxy],  # noqa: ARG002 (part of the protocol)
    ) -> Request:
        """A recording of speech, cut to a window; noise if there is no processor."""
        any_model = "frames" not in export.settings
        if any_model and (processor is None or "composer" in export.settings):
            return Request(inputs=example_sound(export.parts[0].inputs[0]))
        if processor is None:
            shape = (1, *map(int, export.parts[0].inputs[0].shape[1:]))
            noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            return Request(inputs={"input_features": noise})
        extractor = feature_extractor_of(processor)
        if any_model:
            return Request(audio=(EXAMPLE,))
        rate, most = int(extractor.sampling_rate), int(extractor.n_samples)
        samples = load_sound(EXAMPLE, rate)
        return Request(audio=(EXAMPLE if len(samples) <= most else samples[:most],))

    def run(self, job: Job) -> dict[str, Any]:
        """Generate.

        Returns:
            ``generated_ids [sounds, tokens]`` int64, ``segments`` if there are timestamps, and
            ``perf_metrics``.

        Raises:
            UsageError: The export is a stub, or transformers refuses the settings.
        """
        if job.export.kind == "stub":
            raise UsageError(
                "a stub's outputs mean nothing, so no transcript can be had from it",
                "Export with proxy='split' to transcribe.",
            )
        check_settings(job.settings)
        if "frames" not in job.export.settings:
            return run_sounds(job)
        features = job.tensors["input_features"].float()
        frames = job.export.settings["frames"]
        settings = {
            name: value
            for name, value in job.settings.items()
            if value is not None and name != "generation_config"
        }
        if features.shape[-1] < frames:
            raise UsageError(
                f"input_features has {features.shape[-1]} frames, and a window has {frames}",
                "Let the processor pad it with silence: padding='max_length'.",
            )
        if features.shape[-1] > frames:
            settings.setdefault("return_timestamps", True)
        if "decoder_input_ids" in job.tensors:
            settings["decoder_input_ids"] = _start_of(job, len(features))
        model = ProxyWhisper(job)
        _check_timestamps(model, settings, features.shape[-1] > frames)
        begin = time.perf_counter()
        try:
            # transformers notes settings that its own code passes twice.
            with quiet_logs("transformers.generation"), draws_seeded(settings.pop("seed", None)):
                output = model.generate(
                    features,
                    attention_mask=job.tensors.get("attention_mask"),
                    return_segments=bool(settings.get("return_timestamps")),
                    **settings,
                )
        except (ValueError, TypeError) as error:
            raise UsageError(f"transformers refuses to generate: {error}") from error
        segments = output["segments"] if isinstance(output, dict) else None
        ids = output["sequences"] if isinstance(output, dict) else output
        perf = _perf(begin, time.perf_counter(), model.step_times, ids.numel())
        return {"generated_ids": to_array(ids), "segments": segments, "perf_metrics": perf}


class ProxyWhisper(WhisperForConditionalGeneration):  # type: ignore[misc]
    """Whisper, computed by sessions instead of weights.

    Its modules are on the meta device: transformers' generation code reads the architecture from
    them, and they use no memory. Instead of the encoder's output, the generation code gets row
    numbers, which beams and fallbacks may repeat and reorder.

    Args:
        job: The parts to run, and the generation settings.
    """

    def __init__(self, job: Job) -> None:
        with torch.device("meta"):
            super().__init__(job.config)
        self.generation_config = generation_config_of(job)
        self._steps = _Steps(job)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of features, ids and logits: the host."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features and logits."""
        return torch.float32

    @property
    def step_times(self) -> list[float]:
        """When each pass of the decoder ended."""
        return self._steps.times

    def get_encoder(self, *_args: Any, **_kwargs: Any) -> nn.Module:
        """The replacement of the encoder."""
        return _EncoderRunner(self._steps, self.config)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Run the decoder once, and the encoder before it if there are features.

        Args:
            input_features: ``[batch, mel, frames]``; needed without ``encoder_outputs``.
            decoder_input_ids: ``[batch, query]`` int64.
            decoder_attention_mask: ``[batch, past + query]``; ``None`` for no padding.
            encoder_outputs: The output of `get_encoder`; its rows may be repeated and reordered.
            past_key_values: The cache, which is returned with the new positions.
            cache: The same, as transformers names it since 5.24.

        Returns:
            ``logits [batch, query, vocabulary]`` float32 and the cache.
        """
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_features)
        assert decoder_input_ids is not None  # noqa: S101 (the generation loop gives them)
        both = past_key_values if cache is None else cache
        own = both.self_attention_cache if both is not None else None
        past = own.get_seq_length() if own is not None else 0
        logits, arrays = self._steps.decode(
            to_array(decoder_input_ids),
            to_array(decoder_attention_mask.to(torch.int64))
            if decoder_attention_mask is not None
            else np.ones((len(decoder_input_ids), past + decoder_input_ids.shape[1]), np.int64),
            to_array(encoder_outputs[0].reshape(-1).to(torch.int64)),
            arrays_of_cache(own) if past else {},
        )
        if own is not None:
            fill_cache(arrays, own)
        return Seq2SeqLMOutput(logits=to_tensor(logits).float(), **{LIBRARY_CACHE_NAME: both})


class _Steps:
    """Runs the parts, and numbers the runs as a dump does."""

    def __init__(self, job: Job) -> None:
        limit = int(job.config.max_target_positions)
        self.encoder = EncoderRun(job.export.parts[:1], job.sessions, job.recorder)
        self.engine = CausalEngine(job.export.parts[1:], job.sessions, limit, self.encoder)
        self.recorder = job.recorder
        self.times: list[float] = []
        self.features: torch.Tensor | None = None
        self.prefills = 0
        self.decode_steps = 0

    def encode(self, features: torch.Tensor) -> int:
        """Run the encoder, unless its last features were the same; return the batch size."""
        if self.features is None or not torch.equal(self.features, features):
            self.encoder.encode({"input_features": to_array(features)}, step=self.prefills)
            self.features = features.clone()
        return self.encoder.rows

    def decode(
        self, ids: Array, padding: Array, rows: Array, cache: Cache
    ) -> tuple[Array, dict[str, Array]]:
        """Run the decoder's parts once, with the cross keys of ``rows``."""
        self.encoder.choose(rows)
        if padding.shape[1] > ids.shape[1]:
            step = StepId("decode", self.decode_steps)
            self.decode_steps += 1
        else:
            step = StepId("prefill", self.prefills)
            self.prefills += 1
        logits, present = self.engine.step(step, ids, padding, cache, recorder=self.recorder)
        self.times.append(time.perf_counter())
        return logits, present


class _EncoderRunner(nn.Module):
    """The module that transformers' generation calls as the encoder."""

    main_input_name = "input_features"

    def __init__(self, steps: _Steps, config: PreTrainedConfig) -> None:
        super().__init__()
        self._steps = steps
        self.config = config

    def forward(self, input_features: torch.Tensor, **_: Any) -> BaseModelOutput:
        """``[batch, mel, frames]`` to row numbers, ``[batch, 1, 1]``."""
        batch = self._steps.encode(input_features)
        return BaseModelOutput(last_hidden_state=torch.arange(batch).float()[:, None, None])


def _start_of(job: Job, sounds: int) -> torch.Tensor:
    """The first tokens of each transcript, ``[sounds, tokens]`` int64: for language and task.

    Raises:
        UsageError: They are not tokens of this model, or not a row for each sound.
    """
    name = "decoder_input_ids"
    ids = checked_ids(job.tensors, job.export.settings["vocabulary"], name)
    if len(ids) != sounds:
        raise UsageError(f"{name} has {len(ids)} rows for {sounds} sounds", "Give one for each.")
    return ids


def _check_timestamps(model: ProxyWhisper, settings: Mapping[str, Any], long: bool) -> None:
    """Refuse requests that need timestamp tokens if the model has none: it would invent tokens."""
    marker = getattr(model.generation_config, "no_timestamps_token_id", None)
    vocabulary = int(model.config.vocab_size)
    if not settings.get("return_timestamps") or (marker is not None and marker + 1 < vocabulary):
        return
    seconds = int(model.config.max_source_positions) / 50
    raise UsageError(
        "this model has no timestamp tokens"
        + (f", so it takes at most {seconds:g} s of sound at once" if long else ""),
        "Pass the sound in pieces." if long else "Remove return_timestamps.",
    )


def _perf(begin: float, end: float, times: list[float], tokens: int) -> PerfMetrics:
    decode = times[-1] - times[0] if len(times) > 1 else 0.0
    return PerfMetrics(
        prefill_time=times[0] - begin,
        decode_perf=(len(times) - 1) / decode if decode else 0.0,
        total_perf=tokens / (end - begin),
        total_time=end - begin,
    )


def _proxy_logits(proxy: Proxy, features: Array, ids: Array, padding: Array) -> Array:
    """Logits of the parts, run step by step: ``[batch, sequence, vocabulary]``."""
    sessions = {part.name: TorchSession(part) for part in proxy.parts}
    encoder = EncoderRun(proxy.parts[:1], sessions)
    encoder.encode({"input_features": features})
    engine = CausalEngine(proxy.parts[1:], sessions, supplier=encoder)
    pieces: list[Array] = []
    cache: Cache = {}
    start = 0
    for index, length in enumerate(_STEPS):
        stop = start + length
        logits, cache = engine.step(
            StepId("prefill", index), ids[:, start:stop], padding[:, :stop], cache
        )
        pieces.append(logits.astype(np.float32))
        start = stop
    return np.concatenate(pieces, axis=1)
