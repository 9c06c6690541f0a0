"""Speech recognizers with an encoder and a decoder, of any family but Whisper.

They learn from the model itself, as encoder-decoders of texts do
(`qeff_proxy.families.encoder_decoder`). Each sound runs alone, so that nothing is padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, given_tensor, to_array, to_tensor
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.families.cross_attention import probe_cross_attention
from qeff_proxy.families.encoder_decoder import (
    EncoderPart,
    decoder_of,
    decoder_parts,
    ones_like_rows,
    operations_of_head,
    projection_of,
)
from qeff_proxy.families.generic import path_of
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.equality import TOLERANCES
from qeff_proxy.flows.flow import Job
from qeff_proxy.flows.generation.encoder_decoder import EncoderRun, generate_from_encoder
from qeff_proxy.flows.generation.generate import PerfMetrics
from qeff_proxy.flows.generation.inputs import checked_ids
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request
from qeff_proxy.session.cache_buffers import Cache
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_audio import ctc

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

#: Samples that are traced, and of those that are checked and verified.
_TRACE_SAMPLES, _CHECK_SAMPLES = 6_000, (5_120, 8_000)  # some take blocks of 80
_VERIFY_STEPS = (64, 47)
_MOST_SAMPLES_OF_A_BLOCK = 1_000
_LEAST_CHANGE = 1e-3  # of the largest hidden state
_STEPS = (5, 2, 1)  # queries of the prefill, a second chunk, a decode step


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site:
    """The decoder's token embedding.

    Raises:
        UnsupportedModelError: The model is no recognizer with an encoder and a decoder.
    """
    decoder = model.get_decoder()
    if not model.config.is_encoder_decoder or not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no speech recognizer with an encoder and a decoder of its "
            "own",
            "Of a decoder without its encoder, export the whole recognizer "
            "(QEFFAutoModelForSpeechSeq2Seq); a plugin can build the parts of others.",
        )
    if (name := _sound_name(model)) not in ("input_values", "input_features"):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {name}, and no sound, so it recognizes none",
            "A plugin for this model type can build its parts.",
        )
    path = path_of(model, decoder.get_input_embeddings())
    if path is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding of its decoder")
    return Site(path)


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site:
    """The head of ``get_output_embeddings()``, and what follows it."""
    head = model.get_output_embeddings()
    path = path_of(model, head)
    if head is None or path is None:
        raise UnsupportedModelError(f"{type(model).__name__} gives hidden states, not logits")
    return Site(path, follows=operations_of_head(model))


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """Encoder, token embedding, decoder body and head; encoder and decoder if not split."""
    encoder, block = model.get_encoder(), 1
    if _sound_name(model) == "input_values":
        block = _block_of(encoder, model.dtype)
        checks = tuple({"samples": samples} for samples in _CHECK_SAMPLES)
        edges: dict[str, Any] = {
            "trace_sizes": {"samples": _TRACE_SAMPLES},
            "check_sizes": checks,
        }
        sound = ctc.samples_input(model)
    else:
        sound, edges = ctc.features_input(model, encoder)
    needs_mask = _needs_mask(encoder, sound)
    return proxy_of(model, embedding, lm_head, kind, sound, edges, block, needs_mask=needs_mask)


def proxy_of(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    sound: TensorSpec,
    edges: Mapping[str, Any],
    block: int = 1,
    *,
    entry: str | None = None,
    needs_mask: bool = False,
    before: nn.Module | None = None,
    positions: int | None = None,
) -> Proxy | None:
    """The parts of a recognizer.

    Args:
        model: The recognizer.
        embedding: The decoder's token embedding.
        lm_head: The head.
        kind: Of the proxy.
        sound: The encoder part's input.
        edges: The sizes to trace and check that part at.
        block: The encoder takes whole blocks of so many samples.
        entry: The encoder's argument for the sound; ``None`` where it has the input's name.
        needs_mask: As of `EncoderPart`.
        before: As of `EncoderPart`.
        positions: Of every sound's hidden states, where their number is fixed.
    """
    if isinstance(lm_head, Absent) or isinstance(embedding, Absent):
        return None
    encoder, decoder, projection = model.get_encoder(), decoder_of(model), projection_of(model)
    rows, width = model.get_submodule(embedding.module).weight.shape
    states = int(width) if projection is None else projection.out_features
    attention = probe_cross_attention(decoder, int(width), states)
    module = EncoderPart(
        encoder,
        decoder,
        attention,
        entry or sound.name,
        sound.name,
        projection=projection,
        needs_mask=needs_mask,
        before=before,
    )
    cross = attention.cross_specs(positions or "frames")
    first = Part("encoder", module, (sound,), cross, "encoder", **edges)
    length = positions or "sequence"
    parts = (first, *decoder_parts(model, attention, (embedding, lm_head), kind, length))
    vocabulary = int(model.get_submodule(lm_head.module).weight.shape[0])
    settings = {
        "vocabulary": vocabulary,
        "embedding_rows": int(rows),
        "hidden_size": int(width),
        "samples_per_block": block,
    }
    return Proxy(kind, "speech-seq2seq", parts, settings)


def _block_of(encoder: PreTrainedModel, dtype: torch.dtype) -> int:
    """The encoder takes whole blocks of so many samples."""
    some = _CHECK_SAMPLES[0]
    for more in range(1, _MOST_SAMPLES_OF_A_BLOCK):
        try:
            with torch.no_grad():
                encoder(torch.zeros(1, some + more, dtype=dtype, device=encoder.device))
        except RuntimeError:  # torch's, of shapes that do not fit
            continue
        return more
    return 1


def _needs_mask(encoder: PreTrainedModel, sound: TensorSpec) -> bool:
    """Whether a padding mask changes what the encoder makes of a sound that is not padded."""
    if "attention_mask" not in inspect.signature(encoder.forward).parameters:
        return False
    length = _CHECK_SAMPLES[0] if len(sound.shape) == 2 else _VERIFY_STEPS[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, *map(int, sound.shape[2:]))
    noise = torch.randn(shape, generator=generator).to(encoder.device, encoder.dtype)
    with torch.no_grad():
        without = encoder(noise)[0]
        masked = encoder(noise, attention_mask=ones_like_rows(noise))[0]
    limit = max(_LEAST_CHANGE, TOLERANCES.get(sound.dtype, 0)) * without.abs().max()
    return without.shape == masked.shape and bool((without - masked).abs().max() > limit)


def _sound_name(model: PreTrainedModel) -> str:
    """What the encoder takes; a model made of two others may call it anything."""
    named = str(model.main_input_name)
    return str(model.get_encoder().main_input_name) if named == "inputs" else named


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """The sounds, padded at the end, and their ``lengths``; the user's ``decoder_input_ids``."""
    name = "decoder_input_ids"
    if request.inputs is None or request.inputs.get(name) is None:
        return ctc.preprocess(processor, request)
    others = {key: value for key, value in request.inputs.items() if key != name}
    tensors = ctc.preprocess(processor, replace(request, inputs=others))
    ids = given_tensor(name, request.inputs[name], "Give token ids.")
    return {**(tensors or {}), name: ids}


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """``texts``, and with timestamps also ``segments`` with start, end and text."""
    if processor is None or "generated_ids" not in outputs:
        return None
    texts = processor.batch_decode(outputs["generated_ids"], skip_special_tokens=True)

    def shown(piece: Mapping[str, Any]) -> dict[str, Any]:
        text = processor.decode(piece["tokens"], skip_special_tokens=True).strip()
        return {"start": float(piece["start"]), "end": float(piece["end"]), "text": text}

    segments = outputs.get("segments")
    if segments is not None:
        segments = [[shown(piece) for piece in of_one] for of_one in segments]
    return {"texts": [text.strip() for text in texts], "segments": segments}


def logits_of_model_and_parts(model: PreTrainedModel, proxy: Proxy) -> tuple[Array, Array]:
    """Logits ``[sounds, tokens, vocabulary]`` of the uncut model in one pass, and of the parts."""
    generator = np.random.default_rng(0)
    spec = proxy.parts[0].inputs[0]
    lengths = _CHECK_SAMPLES if len(spec.shape) == 2 else _VERIFY_STEPS
    pad = model.config.get_text_config(decoder=True).pad_token_id
    rows = range(len(model.get_decoder().get_input_embeddings().weight))
    allowed = np.array([row for row in rows if row != pad])
    expected, actual = [], []
    for length in lengths:
        shape = (1, length, *map(int, spec.shape[2:]))
        sound = to_tensor(generator.standard_normal(shape).astype(np.float32)).to(model.dtype)
        ids = generator.choice(allowed, (1, sum(_STEPS)))
        first: Any = proxy.parts[0].module
        given = {spec.name: sound, "decoder_input_ids": to_tensor(ids)}
        if first.needs_mask:
            given["attention_mask"] = ones_like_rows(sound)
        with torch.no_grad():
            if first.before is not None:  # what the model's own generation does first
                given[spec.name] = first.before(sound)
            outputs = model(**given, use_cache=False)
        expected.append(to_array(outputs.logits.float()))
        actual.append(_logits_of_parts(proxy, to_array(sound), ids))
    return np.concatenate(expected), np.concatenate(actual)


def _logits_of_parts(proxy: Proxy, sound: Array, ids: Array) -> Array:
    sessions = {part.name: TorchSession(part) for part in proxy.parts}
    run = EncoderRun(proxy.parts[:1], sessions)
    run.encode({proxy.parts[0].inputs[0].name: sound})
    engine = CausalEngine(proxy.parts[1:], sessions, supplier=run)
    pieces: list[Array] = []
    cache: Cache = {}
    for index, stop in enumerate(np.cumsum(_STEPS)):
        queries, seen = ids[:, stop - _STEPS[index] : stop], np.ones((1, stop), np.int64)
        logits, cache = engine.step(StepId("prefill", index), queries, seen, cache)
        pieces.append(logits.astype(np.float32))
    return np.concatenate(pieces, axis=1)


def run_sounds(job: Job) -> dict[str, Any]:
    """Transcribe each sound alone.

    Returns:
        ``generated_ids [sounds, tokens]`` int64 without the tokens that the decoder started with,
        ``segments``, which are ``None``, and ``perf_metrics``.

    Raises:
        UsageError: A dump of several sounds was asked for, or transformers refuses the settings.
    """
    spec = job.export.parts[0].inputs[0]
    sounds, lengths = job.tensors[spec.name], job.tensors["lengths"]
    if job.recorder is not None and len(sounds) > 1:
        raise UsageError(
            f"{len(sounds)} sounds run one after another, and a dump is of one", "Give one sound."
        )
    starts = job.tensors.get("decoder_input_ids")
    if starts is not None:
        rows = job.export.settings["embedding_rows"]
        starts = checked_ids(job.tensors, rows, "decoder_input_ids")
        if len(starts) != len(sounds):
            raise UsageError(
                f"decoder_input_ids has {len(starts)} rows for {len(sounds)} sounds",
                "Give one for each.",
            )
    tokens, timings = [], []
    block = job.export.settings.get("samples_per_block", 1)  # absent from older exports
    for row, length in enumerate((lengths - lengths % block).tolist()):  # as the model masks it
        run = EncoderRun(job.export.parts[:1], job.sessions, job.recorder)
        run.encode({spec.name: to_array(sounds[row : row + 1, :length].float())})
        start = {} if starts is None else {"decoder_input_ids": starts[row : row + 1]}
        generated = generate_from_encoder(job, run, job.export.parts[1:], start)
        tokens.append(generated.ids[0])
        timings.append(generated.perf)
    ids = np.full((len(tokens), max(map(len, tokens))), _pad_of(job), np.int64)
    for row, new in enumerate(tokens):
        ids[row, : len(new)] = new
    return {"generated_ids": ids, "segments": None, "perf_metrics": _together(timings, ids.size)}


def _pad_of(job: Job) -> int:
    pad = job.config.get_text_config(decoder=True).pad_token_id
    return 0 if pad is None else int(pad)


def _together(timings: Sequence[PerfMetrics], tokens: int) -> PerfMetrics:
    """The timings of sounds that ran one after another."""
    total = sum(one.total_time for one in timings)
    first = timings[0]
    return PerfMetrics(first.prefill_time, first.decode_perf, tokens / total, total)


def example_sound(job_input: Any) -> dict[str, Array]:
    """Noise for an export's first input, where there is no processor for a recording."""
    length = _TRACE_SAMPLES if len(job_input.shape) == 2 else _VERIFY_STEPS[0]
    shape = (1, length, *map(int, job_input.shape[2:]))
    return {job_input.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
