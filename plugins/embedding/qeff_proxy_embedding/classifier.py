"""The five hooks of classifiers of texts, and of their tokens, of any family.

The whole model runs once, from its token embedding to a score for each label; its head is small and
stays in the body. What masks the model makes, and whether padding changes its results, a run of its
base model says (`qeff_proxy_embedding.probe`). Decoders score every token and take that of the last
one: padding is on the right, so it is the last that the mask shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder import EmbeddingPart, EmbeddingStub
from qeff_proxy.families.generic import path_of
from qeff_proxy.families.window_attention import with_open_windows
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, MaskSpec, Part, Proxy, TensorSpec
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_embedding.family import family
from qeff_proxy_embedding.part import EncoderPart
from qeff_proxy_embedding.pooling import Pooling
from qeff_proxy_embedding.probe import has_decoder, probe_model

__all__ = ["ClassifierPart", "build_proxy", "decode", "locate_embedding", "locate_lm_head"]

_TOKENS = 5


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site:
    """The token embedding.

    Raises:
        UnsupportedModelError: The model takes no token ids, or has an encoder and a decoder.
    """
    name = type(model).__name__
    if model.base_model is model or model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{name} is no classifier of texts", "Check the checkpoint's architecture."
        )
    if has_decoder(model):
        raise UnsupportedModelError(
            f"{name} has an encoder and a decoder, which are not exported for this task",
            "A plugin for this model type can build its parts.",
        )
    try:
        path = path_of(model, model.get_input_embeddings())
    except (NotImplementedError, AttributeError):
        path = None
    if path is None:
        raise UnsupportedModelError(f"{name} has no token embedding")
    return Site(path)


@hookimpl
def locate_lm_head() -> Absent:
    """There is none."""
    return Absent("a classifier scores its labels, not tokens; its head stays in the body")


@hookimpl
def build_proxy(model: PreTrainedModel, embedding: Site | Absent, kind: Kind) -> Proxy | None:
    """Token embedding, and body with the classifier; one graph for ``stub`` and ``whole``."""
    if isinstance(embedding, Absent):
        return None
    table = model.get_submodule(embedding.module)
    width = int(table.weight.shape[1])
    probe = probe_model(model.base_model)
    shape, takes_last = _probe_logits(model)
    whole: nn.Module = _LastToken(model) if takes_last else model
    dtype = dtype_name(model.dtype)
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    parts: tuple[Part, ...]
    if kind == "split":
        cut = probe.without_table(model, table)
        whole = _LastToken(cut) if takes_last else cut
        embeds = TensorSpec("inputs_embeds", dtype, ("batch", "sequence", width))
        body = ClassifierPart(whole, probe.masks, embeds.name, shape)
        parts = (
            Part("embedding", EmbeddingPart(table), (ids,), (embeds,), "vocabulary"),
            body.as_part("body", embeds, body.output(0)),
        )
    else:
        if kind == "stub":
            stub = EmbeddingStub(width, model.dtype)
            paths = [p for p, m in model.named_modules(remove_duplicate=False) if m is table]
            short = replace_modules(model, dict.fromkeys(paths, stub))
            whole = _LastToken(short) if takes_last else short
        one = ClassifierPart(whole, probe.masks, ids.name, shape)
        parts = (one.as_part("model", ids, one.output(0)),)
    settings = {
        **probe.settings(kind),
        "hidden_size": width,
        "embedding_rows": int(table.weight.shape[0]),
        # transformers takes the scores of the last token that is none of these.
        "skipped_at_the_end": model.config.get_text_config().pad_token_id if takes_last else None,
    }
    return Proxy(kind, "classification", parts, settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Token ids of the texts, or of pairs of them, padded on the right."""
    return family.preprocess(processor, request)


@hookimpl
def decode(outputs: Mapping[str, Any]) -> list[Any] | None:
    """Of each text, or each token of it, its ``label`` and the ``scores`` of all labels.

    Scores are those of transformers' pipelines: a softmax over the labels; of a text, a sigmoid of
    each where several labels may hold or there is but one; of a regression, the numbers themselves.
    """
    if "logits" not in outputs:
        return None
    return [_decoded(one, outputs["labels"], outputs["problem_type"]) for one in outputs["logits"]]


def _decoded(logits: Any, labels: list[str], problem: str | None) -> Any:
    scores = logits.astype(np.float64)
    several = len(labels) > 1 and problem != "multi_label_classification"
    if logits.ndim > 1 or (several and problem != "regression"):
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    elif problem != "regression":
        scores = 1 / (1 + np.exp(-scores))
    if logits.ndim > 1:
        return [_labelled(*token, labels) for token in zip(logits, scores, strict=True)]
    return _labelled(logits, scores, labels)


def _labelled(logits: Any, scores: Any, labels: list[str]) -> dict[str, Any]:
    numbers = dict(zip(labels, map(float, scores), strict=True))
    return {"label": labels[int(np.argmax(logits))], "scores": numbers}


class ClassifierPart(EncoderPart):
    """A classifier that runs once, with plain tensors as masks.

    Args:
        model: The classifier.
        masks: The attention masks that it makes.
        entry: The name of the first input, ``"inputs_embeds"`` or ``"input_ids"``.
        shape: The axes of its logits.
    """

    def __init__(
        self,
        model: Any,
        masks: tuple[MaskSpec, ...],
        entry: str,
        shape: tuple[int | str, ...],
    ) -> None:
        super().__init__(model, masks, Pooling("none"), entry)
        self.shape = shape

    def output(self, width: int) -> TensorSpec:  # noqa: ARG002 (it has no hidden states)
        """``logits``: ``[batch, labels]``, or ``[batch, sequence, labels]``."""
        return TensorSpec("logits", dtype_name(self.model.dtype), self.shape)

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the classifier; the arguments are those of `EncoderPart.forward`."""
        return {"logits": super().forward(**tensors)["last_hidden_state"]}


class _LastToken(nn.Module):
    """A decoder with heads that score each token; gives the scores of the last one.

    transformers looks for it among the token ids, which a body does not get.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = model.dtype
        self.decoder = model.base_model
        heads = _heads(model)
        self.head = heads[0] if len(heads) == 1 else nn.Sequential(*heads)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """``[batch, labels]`` for padding on the right."""
        given = {"input_ids": input_ids} if inputs_embeds is None else {}
        hidden = self.decoder(
            **given, inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        )[0]
        assert attention_mask is not None  # noqa: S101 (the part passes it)
        last = (attention_mask.sum(-1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (self.head(hidden.gather(1, last))[:, 0],)


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The modules with weights beside the base model."""
    return [
        child
        for child in model.children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _probe_logits(model: PreTrainedModel) -> tuple[tuple[int | str, ...], bool]:
    """The axes of a classifier's logits, and whether it scores all tokens and takes one.

    Raises:
        UnsupportedModelError: It cannot be run on token ids alone, or makes some attend globally.
    """
    table = model.get_input_embeddings()
    pad = model.config.get_text_config().pad_token_id
    allowed = [row for row in range(table.weight.shape[0]) if row != pad][: 2 * _TOKENS : 2]
    ids = torch.tensor([allowed], device=table.weight.device)
    given: list[torch.Tensor] = []
    heads = _heads(model)
    handles = [
        head.register_forward_pre_hook(lambda _, args: given.append(args[0])) for head in heads
    ]
    try:
        with torch.no_grad():
            logits = with_open_windows(model)[0](input_ids=ids).logits
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model's code raises on inputs it is not made for
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on token ids alone: {type(error).__name__}: "
            f"{first_line(error)}",
            "Only classifiers of texts are exported.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    labels = int(logits.shape[-1])
    if logits.dim() == 3 and logits.shape[1] == ids.shape[1]:
        return ("batch", "sequence", labels), False
    if logits.dim() != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {list(logits.shape)} for {ids.shape[1]} tokens",
            "Only scores of texts, or of their tokens, are exported.",
        )
    if [one.dim() for one in given] != [3] * len(heads) or not isinstance(heads[-1], nn.Linear):
        return ("batch", labels), False
    # Some take the mean of all scores. Of this run: layers without weights give random numbers.
    with torch.no_grad():
        last = nn.Sequential(*heads)(given[0])[:, -1]
    return ("batch", labels), bool((last - logits).abs().max() <= 1e-3 * logits.abs().max())
