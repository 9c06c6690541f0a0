"""The five hooks of masked LMs of any family: encoders that guess the tokens that are hidden.

The body is the encoder, as that of an embedding model without pooling. The ``lm_head`` part is all
that comes behind it: the transform of the hidden states, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder import EmbeddingPart, EmbeddingStub, HeadPart, HeadStub
from qeff_proxy.families.generic import check_head_runs, operations_after, path_of
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_embedding.classifier import ClassifierPart, locate_embedding
from qeff_proxy_embedding.family import family
from qeff_proxy_embedding.part import EncoderPart
from qeff_proxy_embedding.pooling import Pooling
from qeff_proxy_embedding.probe import probe_model

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

#: So many guesses are named for a token, as transformers' ``fill-mask`` pipeline does.
_GUESSES = 5


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site:
    """The module of ``get_output_embeddings()``, and the operations that follow it.

    Raises:
        UnsupportedModelError: The model names none, or its head does not run alone.
    """
    path = path_of(model, model.get_output_embeddings())
    if path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} names no matrix that turns hidden states into logits",
            "Its encoder alone is exported with --model-task embedding (in Python: QEFFAutoModel).",
        )
    width = probe_model(model.base_model).width
    part = HeadPart(model, model.base_model_prefix)
    check_head_runs(part, width)
    return Site(path, follows=operations_after(part, path, width))


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """Token embedding, encoder and head; one graph for ``stub`` and ``whole``."""
    if isinstance(embedding, Absent) or isinstance(lm_head, Absent):
        return None
    table, matrix = (model.get_submodule(site.module) for site in (embedding, lm_head))
    width, vocabulary = int(table.weight.shape[1]), int(matrix.weight.shape[0])
    probe = probe_model(model.base_model)
    dtype, rows = dtype_name(model.dtype), ("batch", "sequence")
    ids = TensorSpec("input_ids", "int64", rows)
    parts: tuple[Part, ...]
    if kind == "split":
        if probe.masking is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} changes all embeddings of a text with hidden tokens, "
                "of which a body cannot know",
                "Export it without a proxy (--proxy none).",
            )
        cut = probe.without_table(model.base_model, table)
        embeds = TensorSpec("inputs_embeds", dtype, (*rows, width))
        body = EncoderPart(cut, probe.masks, Pooling("none"), embeds.name)
        hidden = body.output(probe.width)
        logits = TensorSpec("logits", dtype, (*rows, vocabulary))
        head = HeadPart(model, model.base_model_prefix)
        parts = (
            Part("embedding", EmbeddingPart(table), (ids,), (embeds,), "vocabulary"),
            body.as_part("body", embeds, hidden),
            Part("lm_head", head, (hidden,), (logits,), "vocabulary"),
        )
    else:
        whole: Any = model
        if kind == "stub":
            stubs = {
                embedding.module: EmbeddingStub(width, model.dtype),
                lm_head.module: HeadStub(),
            }
            whole = replace_modules(model, stubs)
            vocabulary = int(matrix.weight.shape[1])
        one = ClassifierPart(whole, probe.masks, ids.name, (*rows, vocabulary))
        parts = (one.as_part("model", ids, one.output(0)),)
    settings = {
        **probe.settings(kind),
        "hidden_size": probe.width,
        "embedding_rows": int(table.weight.shape[0]),
    }
    return Proxy(kind, "masked-lm", parts, settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Token ids of the texts, padded on the right."""
    return family.preprocess(processor, request)


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[Any] | None:
    """Of each text, a ``label``, the likeliest token, and the ``scores`` of the five likeliest.

    That of its masked token, or a list where there are several. Of a text without one, a list of
    those of all its tokens. Scores are a softmax over the vocabulary.
    """
    if "logits" not in outputs:
        return None
    mask = getattr(processor, "mask_token_id", None)
    found = []
    for ids, logits in zip(outputs["input_ids"], outputs["logits"], strict=True):
        masked = np.flatnonzero(ids == mask)
        places = masked if masked.size else np.arange(len(ids))
        guesses = [_guessed(logits[place], processor) for place in places]
        found.append(guesses[0] if masked.size == 1 else guesses)
    return found


def _guessed(logits: Any, tokenizer: Any) -> dict[str, Any]:
    """The likeliest tokens; their ids as text where there is no tokenizer."""
    scores = np.exp(logits.astype(np.float64) - logits.max())
    scores /= scores.sum()
    guesses: dict[str, float] = {}
    for index in map(int, np.argsort(-scores, kind="stable")[:_GUESSES]):
        name = str(index) if tokenizer is None else tokenizer.decode([index])
        guesses.setdefault(name, float(scores[index]))
    return {"label": next(iter(guesses)), "scores": guesses}
