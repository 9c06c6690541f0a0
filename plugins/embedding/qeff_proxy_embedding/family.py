"""The five hooks of embedding models of any family.

They learn from the model itself: ``get_input_embeddings()`` is the token embedding, ``forward``
says whether it takes token types, and a run on a few tokens (`qeff_proxy_embedding.probe`) what
masks it creates, how many positions it has and whether padding changes its results. Base models of
causal LMs (Qwen3-Embedding, e5-mistral, EmbeddingGemma) are run once without a cache; of an encoder
and a decoder (T5) the encoder is run.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensors
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.families.decoder import EmbeddingPart, EmbeddingStub
from qeff_proxy.families.generic import path_of
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_embedding.part import EncoderPart
from qeff_proxy_embedding.pooling import pooling_of_options
from qeff_proxy_embedding.probe import encoder_of, probe_model
from qeff_proxy_embedding.sentence_folder import load_dense, read_sentence_folder

__all__ = ["EmbeddingFamily", "family"]

#: Methods of models that take more than text.
_TOWERS = ("get_image_features", "get_video_features", "get_audio_features")


class EmbeddingFamily:
    """The hooks of all families.

    Args:
        token_table: Dotted path of the token embedding in the base model; by default where
            ``get_input_embeddings()`` of the model says. Position and token type embeddings stay
            in the body.
    """

    def __init__(self, token_table: str | None = None) -> None:
        self.token_table = token_table

    @hookimpl
    def locate_embedding(self, model: PreTrainedModel) -> Site | None:
        """The token embedding; ``None`` if the model is not a base model but has a head."""
        if model.base_model is not model:
            return None
        if path_of(model, model.get_output_embeddings()) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an LM head: it gives logits, not hidden states",
                "Export it for the task that its architecture names.",
            )
        if self.token_table is not None:
            return Site(self.token_table)
        encoder = encoder_of(model)
        if "input_ids" not in inspect.signature(encoder.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} takes {encoder.main_input_name}, not token ids",
                "Of models without a head, only those that embed texts are exported.",
            )
        try:
            table = encoder.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return None
        return next((Site(path) for path, one in model.named_modules() if one is table), None)

    @hookimpl
    def locate_lm_head(self, model: PreTrainedModel) -> Absent | None:
        """There is none: the output of an embedding model is hidden states."""
        if model.base_model is not model:
            return None
        return Absent("an embedding model gives hidden states or a vector, not token logits")

    @hookimpl
    def build_proxy(
        self, model: PreTrainedModel, embedding: Site | Absent, kind: Kind, options: Any
    ) -> Proxy | None:
        """Token embedding, and body with pooling; one graph for ``stub`` and ``whole``."""
        if model.base_model is not model or isinstance(embedding, Absent):
            return None
        table = model.get_submodule(embedding.module)
        narrow = int(table.weight.shape[1])
        folder = Path(model.name_or_path) if model.name_or_path else None
        folder = folder if folder is not None and folder.is_dir() else None
        probe = probe_model(model)
        if any(hasattr(model, name) for name in _TOWERS):
            warnings.warn(
                f"{type(model).__name__} embeds texts alone here: its parts for images or sounds "
                "are left out",
                UserWarning,
                stacklevel=2,
            )
        # With a pooling of the user's, the modules behind the checkpoint's own do not fit.
        own = read_sentence_folder(folder, modules=options.get("pooling") is None)
        pooled = probe.width * (own.pooling.count("+") + 1)
        dense = load_dense(own.dense, pooled)
        vector = pooled if dense is None else dense.width
        pooling = pooling_of_options(options, own, vector)
        dtype = dtype_name(model.dtype)
        ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
        parts: tuple[Part, ...]
        if kind == "split":
            embeds = TensorSpec("inputs_embeds", dtype, ("batch", "sequence", narrow))
            cut = probe.without_table(model, table)
            body = EncoderPart(cut, probe.masks, pooling, "inputs_embeds", dense)
            output = body.output(probe.width)
            parts = (
                Part("embedding", EmbeddingPart(table), (ids,), (embeds,), "vocabulary"),
                body.as_part("body", embeds, output),
            )
        else:
            if kind == "stub":
                stub = EmbeddingStub(narrow, model.dtype)
                paths = [
                    path
                    for path, one in model.named_modules(remove_duplicate=False)
                    if one is table
                ]
                model = replace_modules(model, dict.fromkeys(paths, stub))
            whole = EncoderPart(model, probe.masks, pooling, "input_ids", dense)
            output = whole.output(probe.width)
            parts = (whole.as_part("model", ids, output),)
        limits = filter(None, (probe.positions, own.max_length))
        settings = {
            **pooling.to_json(),
            **probe.settings(kind),
            "max_length": options.get("max_length") or min(limits, default=None),
            "request_options": {"prompt": own.prompt, "lower_case": own.lower_case},
            "hidden_size": probe.width,
            "embedding_rows": int(table.weight.shape[0]),
        }
        return Proxy(kind, "encoder", parts, settings)

    @hookimpl
    def preprocess(self, processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
        """Token ids of the texts with the tokenizer's own special tokens, padded on the right."""
        if request.inputs is not None:
            return given_tensors(request.inputs)
        refuse_others(request, "prompts")
        if processor is None or not request.prompts:
            return None
        return _tokenize(processor, request)

    @hookimpl
    def decode(self, outputs: Mapping[str, Any]) -> Any:
        """``[texts, width]`` float32 vectors, or a list of hidden states, one per text."""
        if "sentence_embedding" in outputs:
            return outputs["sentence_embedding"]
        return outputs.get("last_hidden_state")


def _tokenize(tokenizer: Any, request: Request) -> dict[str, torch.Tensor]:
    if not callable(tokenizer):
        raise UsageError(
            f"{type_named(tokenizer)} is no tokenizer",
            "Pass a tokenizer of transformers, or none to use the checkpoint's own.",
        )
    texts = list(request.prompts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no text", "Give a text or a list of texts.")
    if request.options.get("lower_case"):
        texts = [text.lower() for text in texts]
    texts = [f"{request.options.get('prompt') or ''}{text}" for text in texts]
    pairs = request.options.get("pairs") or [None] * len(texts)
    cut: dict[str, Any] = {}
    if request.options.get("truncation"):
        cut = {"truncation": True, "max_length": request.options["max_length"]}
    rows = [
        tokenizer(text, pair, verbose=False, **cut) for text, pair in zip(texts, pairs, strict=True)
    ]
    for text, row in zip(texts, rows, strict=True):
        if not row["input_ids"]:
            raise UsageError(f"the text {text!r} gives no token", "Give at least one token.")
    longest = max(len(row["input_ids"]) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    names = {"input_ids": pad, "token_type_ids": 0}
    tensors = {
        name: torch.tensor([_padded(list(row[name]), longest, fill) for row in rows])
        for name, fill in names.items()
        if name in rows[0]
    }
    masks = [_padded([1] * len(row["input_ids"]), longest, 0) for row in rows]
    return {**tensors, "attention_mask": torch.tensor(masks)}


def _padded(row: list[int], length: int, fill: int) -> list[int]:
    return row + [fill] * (length - len(row))


family = EmbeddingFamily()
