"""The ``seq2seq`` flow: an encoder of texts runs once, and its decoder step by step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.errors import UsageError
from qeff_proxy.families.experts import has_experts_in_turn
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.causal_lm import shrunk_windows, with_shrunk_masks
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.flows.generation.encoder_decoder import EncoderRun, generate_from_encoder
from qeff_proxy.flows.generation.inputs import checked_ids, checked_mask
from qeff_proxy.flows.generation.settings import check_settings
from qeff_proxy.parts import Proxy
from qeff_proxy.request import refuse_unused
from qeff_proxy.session.cache_buffers import Cache
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

__all__ = ["Seq2SeqFlow"]

_SOURCE = (11, 7)  # tokens of each text; the second is padded
_STEPS = (5, 2, 1)  # queries of the prefill, a second chunk, a decode step
_WINDOW = 4  # a sliding window short enough to hide something within these steps
_TAKES = ("input_ids", "attention_mask", "decoder_input_ids")


class Seq2SeqFlow:
    """An encoder pass, then prefill and decode steps."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the logits of the parts, step by step, with one pass of the model.

        Raises:
            CutError: They differ, or the parts cannot be run.
        """
        generator = np.random.default_rng(0)
        # A model may look for the padding token among its ids, which embeddings do not show.
        pad = model.config.get_text_config(decoder=True).pad_token_id

        def random_ids(rows: int, length: int) -> Array:
            allowed = np.array([row for row in range(rows) if row != pad])
            return generator.choice(allowed, (len(_SOURCE), length))

        source = random_ids(proxy.settings["encoder_rows"], max(_SOURCE))
        ids = random_ids(proxy.settings["embedding_rows"], sum(_STEPS))
        padding = (np.arange(max(_SOURCE)) < np.array(_SOURCE)[:, None]).astype(np.int64)
        if pad is not None:
            source = np.where(padding, source, pad)
        with shrunk_windows(model, _WINDOW):
            with torch.no_grad(), _dtypes_restored(model):
                outputs = model(
                    input_ids=to_tensor(source),
                    attention_mask=to_tensor(padding),
                    decoder_input_ids=to_tensor(ids),
                    use_cache=False,
                )
            expected = to_array(outputs.logits.float())
            with parts_must_run(model, sites):
                actual = _proxy_logits(proxy, source, padding, ids)
        others = any(has_experts_in_turn(part.module) for part in proxy.parts)
        counts = np.ones_like(ids)
        return check_equal(model, sites, expected, actual, counts, output="logit", scanned=others)

    def run(self, job: Job) -> dict[str, Any]:
        """Generate.

        Returns:
            ``generated_ids [texts, tokens]`` int64, without the tokens that the decoder started
            with, and ``perf_metrics``.

        Raises:
            UsageError: A text does not fit, or the export is a stub.
        """
        if job.export.kind == "stub":
            raise UsageError(
                "a stub's outputs mean nothing, so no text can be generated from it",
                "Export with proxy='split' to generate.",
            )
        check_settings(job.settings)
        refuse_unused(job.tensors, _TAKES)
        known = job.export.settings
        ids = checked_ids(job.tensors, known.get("encoder_rows"))
        mask = checked_mask(job.tensors, ids, left=False)
        most = known.get("encoder_positions")
        if most is not None and ids.shape[1] > most:
            raise UsageError(
                f"a text has {ids.shape[1]} tokens, and the encoder has {most} positions",
                "Shorten it.",
            )
        inputs = {"input_ids": ids}
        if job.tensors.get("decoder_input_ids") is not None:
            inputs["decoder_input_ids"] = _start_of(job, len(ids))
        encoder, steps = _divided(job.export.parts)
        run = EncoderRun(encoder, job.sessions, job.recorder)
        run.encode({"encoder_input_ids": to_array(ids)}, to_array(mask))
        generated = generate_from_encoder(job, run, steps, inputs)
        unplaced = generated.ids == known.get("unplaced_token", -1)
        if (unplaced[:, :-1] & ~unplaced[:, 1:]).any():
            warnings.warn(
                "the model generated padding tokens, which have a position here and none in "
                "transformers: the tokens after them may differ",
                UserWarning,
                stacklevel=2,
            )
        return {"generated_ids": generated.ids, "perf_metrics": generated.perf}


@contextmanager
def _dtypes_restored(model: PreTrainedModel) -> Iterator[None]:
    """Undo what routers do, which convert weights of theirs when they run."""
    before = [(weight, weight.dtype) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, dtype in before:
            if weight.dtype != dtype:
                weight.data = weight.data.to(dtype)


def _start_of(job: Job, rows: int) -> torch.Tensor:
    """The user's first tokens of the decoder, ``[texts, tokens]`` int64."""
    name = "decoder_input_ids"
    start = checked_ids(job.tensors, job.export.settings.get("embedding_rows"), name)
    if len(start) != rows:
        raise UsageError(f"{name} has {len(start)} rows for {rows} texts", "Give one for each.")
    if bool((start == job.export.settings.get("unplaced_token", -1)).any()):
        raise UsageError(
            f"{name} has padding, to which the model gives no position", "Leave it out."
        )
    return start


def _divided(parts: Any) -> tuple[list[PartLike], list[PartLike]]:
    """The parts that run once, up to the encoder, and those that run at each step."""
    end = [part.name for part in parts].index("encoder") + 1
    return list(parts[:end]), list(parts[end:])


def _proxy_logits(proxy: Proxy, source: Array, padding: Array, ids: Array) -> Array:
    """Logits of the parts, run step by step: ``[batch, sequence, vocabulary]``."""
    parts = with_shrunk_masks(proxy.parts, _WINDOW)
    sessions = {part.name: TorchSession(part) for part in parts}
    encoder, steps = _divided(parts)
    run = EncoderRun(encoder, sessions)
    run.encode({"encoder_input_ids": source}, padding)
    engine = CausalEngine(steps, sessions, supplier=run)
    pieces: list[Array] = []
    cache: Cache = {}
    start = 0
    for index, length in enumerate(_STEPS):
        stop = start + length
        queries, seen = ids[:, start:stop], np.ones((len(ids), stop), np.int64)
        logits, cache = engine.step(StepId("prefill", index), queries, seen, cache)
        pieces.append(logits.astype(np.float32))
        start = stop
    return np.concatenate(pieces, axis=1)
