"""The hooks of text encoder-decoders of any family (T5, BART, Marian, PEGASUS …).

They learn from the model itself: a run of encoder and decoder on a few embeddings
(`qeff_proxy.families.encoder_decoder`) says what masks they make, what the decoder caches, and
which projections make the keys and values of its cross attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name, given_tensors
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.cross_attention import CrossAttention, probe_cross_attention
from qeff_proxy.families.decoder import EmbeddingPart, EmbeddingStub
from qeff_proxy.families.encoder_decoder import (
    EncoderPart,
    decoder_of,
    decoder_parts,
    operations_of_head,
    projection_of,
)
from qeff_proxy.families.experts import kept_dtypes
from qeff_proxy.families.generic import path_of
from qeff_proxy.families.model_masks import MASK_NAMES, record_masks
from qeff_proxy.families.tokenize import tokenize
from qeff_proxy.families.window_attention import with_open_windows
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Kind, MaskKind, MaskSpec, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

__all__ = ["build_proxy", "decode", "locate_embedding", "locate_lm_head", "preprocess"]

#: What configs call the number of positions of an encoder of texts.
_POSITIONS = ("max_encoder_position_embeddings", "max_position_embeddings")
#: Tokens of a text that is longer than the blocks of models with local attention, and what their
#: configs call the size of these; and of others that make their own masks.
_LONG, _BLOCKS = 600, ("attention_window", "block_size", "local_radius")
_LONGER = 60


@hookimpl
def locate_embedding(model: PreTrainedModel) -> Site:
    """The decoder's token embedding; the encoder's is the same, or of the same kind.

    Raises:
        UnsupportedModelError: The model has no encoder of texts.
    """
    if not model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} is no encoder-decoder of texts",
            "Of these, T5, BART and their kin are exported for this task.",
        )
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if not isinstance(encoder, PreTrainedModel) or not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(
            f"the encoder and the decoder of {type(model).__name__} are no models of their own",
            "A plugin for this model type can build its parts in another way.",
        )
    path = path_of(model, decoder.get_input_embeddings())
    if path is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding of its decoder")
    return Site(path)


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site:
    """The head of ``get_output_embeddings()``, and what follows it, such as a bias of its own."""
    head = model.get_output_embeddings()
    path = path_of(model, head)
    if head is None or path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives hidden states, not logits",
            "Load the model with its LM head (…ForConditionalGeneration).",
        )
    return Site(path, follows=operations_of_head(model))


@hookimpl
def build_proxy(
    model: PreTrainedModel, embedding: Site | Absent, lm_head: Site | Absent, kind: Kind
) -> Proxy | None:
    """Encoder, token embeddings of both, decoder body and head; encoder and decoder if not split.

    The encoder's ids are ``encoder_input_ids``, since ``input_ids`` are the decoder's.
    """
    if isinstance(lm_head, Absent) or isinstance(embedding, Absent):
        return None
    model, reach = with_open_windows(kept_dtypes(model))
    encoder, decoder = model.get_encoder(), decoder_of(model)
    table = encoder.get_input_embeddings()
    width = int(table.weight.shape[1])
    rows = model.get_submodule(embedding.module).weight.shape
    masks = _encoder_masks(encoder, width)
    projection = projection_of(model)
    states = width if projection is None else projection.out_features
    attention = probe_cross_attention(decoder, int(rows[1]), states)
    parts = (
        *_encoder_parts(model, table, width, attention, masks, kind, reach),
        *decoder_parts(model, attention, (embedding, lm_head), kind),
    )
    settings = {
        "embedding_rows": int(rows[0]),
        "encoder_rows": int(table.weight.shape[0]),
        "encoder_positions": _positions(model),
        "hidden_size": int(rows[1]),
    }
    return Proxy(kind, "seq2seq", parts, settings)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Token ids of the texts with the tokenizer's own special tokens, padded on the right."""
    if request.inputs is not None:
        return given_tensors(request.inputs)
    refuse_others(request, "prompts")
    if processor is None or not request.prompts:
        return None
    return tokenize(processor, request.prompts, left=False)


@hookimpl
def decode(processor: Any, outputs: Mapping[str, Any]) -> list[str] | None:
    """The texts of ``generated_ids`` without special tokens; ``None`` without a tokenizer."""
    if processor is None or "generated_ids" not in outputs:
        return None
    texts: list[str] = processor.batch_decode(outputs["generated_ids"], skip_special_tokens=True)
    return texts


def _positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a text; ``None`` where nothing limits them."""
    configs = (model.config, model.get_encoder().config)
    limits = (getattr(config, name, None) for config in configs for name in _POSITIONS)
    return next((n for n in limits if isinstance(n, int) and n > 0), None)


def _encoder_parts(
    model: PreTrainedModel,
    table: nn.Module,
    width: int,
    attention: CrossAttention,
    masks: tuple[MaskSpec, ...],
    kind: Kind,
    reach: int,
) -> tuple[Part, ...]:
    encoder, decoder, projection = model.get_encoder(), decoder_of(model), projection_of(model)
    dtype = dtype_name(model.dtype)
    ids = TensorSpec("encoder_input_ids", "int64", ("batch", "sequence"))
    embeds = TensorSpec("encoder_inputs_embeds", dtype, ("batch", "sequence", width))
    others = (
        *(TensorSpec(mask.name, dtype, ("batch", 1, "sequence", "sequence")) for mask in masks),
        TensorSpec("padding_mask", "int64", ("batch", "sequence")),
    )
    cross = attention.cross_specs("sequence")
    # An encoder without transformers' masks may attend to blocks of a long text.
    long = _LONG if any(hasattr(encoder.config, name) for name in _BLOCKS) else _LONGER
    checks = ({}, {"sequence": min(long, _positions(model) or long)}) if not masks else ()
    edges: dict[str, Any] = {"check_sizes": checks}
    if reach:
        edges["trace_sizes"] = {"sequence": 3 * reach}  # several blocks
    if kind == "split":
        body = EncoderPart(
            encoder, decoder, attention, "inputs_embeds", embeds.name, masks, projection
        )
        first = _EncoderEmbedding(table)
        return (
            Part("encoder_embedding", first, (ids,), (embeds,), "vocabulary"),
            Part("encoder", body, (embeds, *others), cross, "encoder", masks, **edges),
        )
    if kind == "stub":
        stub = EmbeddingStub(width, model.dtype)
        paths = [p for p, one in encoder.named_modules(remove_duplicate=False) if one is table]
        encoder = replace_modules(encoder, dict.fromkeys(paths, stub))
    whole = EncoderPart(encoder, decoder, attention, "input_ids", ids.name, masks, projection)
    return (Part("encoder", whole, (ids, *others), cross, "encoder", masks, **edges),)


class _EncoderEmbedding(EmbeddingPart):
    """``encoder_input_ids`` to ``encoder_inputs_embeds``, by the encoder's own embedding module."""

    def forward(self, encoder_input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, sequence]`` to ``[batch, sequence, hidden]``."""
        return {"encoder_inputs_embeds": self.embedding(encoder_input_ids)}


def _encoder_masks(encoder: PreTrainedModel, width: int) -> tuple[MaskSpec, ...]:
    """The masks that an encoder makes, found by running it on a few embeddings.

    Raises:
        UnsupportedModelError: It cannot be run on embeddings.
    """
    name = type(encoder).__name__
    if "inputs_embeds" not in inspect.signature(encoder.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no inputs_embeds, so its token embedding cannot be cut off",
            "A plugin for this model type can build its parts in another way.",
        )
    device = next(p for p in encoder.parameters() if not p.is_meta).device
    embeds = torch.zeros(1, 3, width, dtype=encoder.dtype, device=device)
    seen = torch.ones(1, 3, dtype=torch.int64, device=device)
    masks: dict[MaskKind, MaskSpec] = {}
    before = [id(module) for module in encoder.modules()]
    try:
        with torch.no_grad(), record_masks(encoder, masks):
            encoder(inputs_embeds=embeds, attention_mask=seen)
        if [id(module) for module in encoder.modules()] != before:
            raise ValueError("it exchanges its attention by the length of the text")
    except Exception as error:  # whatever a model's code raises on inputs it is not made for
        raise UnsupportedModelError(
            f"{name} cannot be run on embeddings: {type(error).__name__}: {first_line(error)}",
            "A plugin for this model type can run it in another way.",
        ) from error
    return tuple(MaskSpec(MASK_NAMES[kind], kind, mask.size) for kind, mask in masks.items())
