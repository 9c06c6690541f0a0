"""The parts of a model with an encoder and a decoder, found by running both once.

The encoder part also computes the keys and values of every decoder layer's cross attention,
``cross_key_values.<layer>.key`` and ``.value``, so that they are computed once and not at each
step. The decoder part takes them with its own cache; one graph serves prefill and decode steps.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.cross_attention import CROSS_MASK, CROSS_PADDING, CrossAttention
from qeff_proxy.families.decoder import (
    EmbeddingPart,
    EmbeddingStub,
    HeadPart,
    HeadStub,
)
from qeff_proxy.families.decoder_cache import CacheLayer, filled_cache
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.families.generic import (
    check_head_runs,
    decoder_path_of,
    operations_after,
    path_of,
)
from qeff_proxy.families.given_embeddings import on_embeddings
from qeff_proxy.families.model_cache import cache_argument
from qeff_proxy.families.model_masks import provide_masks
from qeff_proxy.families.rotary import rotary_by_length
from qeff_proxy.parts import Kind, MaskKind, MaskSpec, Part, TensorSpec
from qeff_proxy.sites import Site


class EncoderPart(nn.Module):
    """An encoder, with the keys and values of every decoder layer's cross attention.

    Args:
        encoder: The encoder.
        decoder: The decoder.
        attention: Of the decoder.
        entry: The encoder's argument that the part's first input goes to.
        first: The name of that input.
        masks: The attention masks that the encoder makes.
        projection: Runs on its hidden states.
        needs_mask: Whether it gets a padding mask of ones where nothing is padded: some limit what
            a position sees only if they have a mask.
        before: Runs on the part's first input.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel,
        attention: CrossAttention,
        entry: str,
        first: str,
        masks: tuple[MaskSpec, ...] = (),
        projection: nn.Module | None = None,
        *,
        needs_mask: bool = False,
        before: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.before = before
        self.encoder = experts_in_turn(rotary_by_length(encoder))
        self.entry = entry
        self.first = first
        self.masks = masks
        self.projection = projection
        self.needs_mask = needs_mask
        self.cross: nn.Module = (
            _Projections(decoder, attention)
            if attention.states is None
            else _FirstStep(decoder, attention)
        )

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the encoder.

        Args:
            tensors: ``first``, the masks ``[batch, 1, sequence, sequence]`` and, for an encoder of
                texts, ``padding_mask [batch, sequence]`` int64.

        Returns:
            ``cross_key_values.<layer>.key`` and ``.value``, ``[batch, heads, positions, width]``.
        """
        masks: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: tensors[mask.name] for mask in self.masks
        }
        given = tensors[self.first]
        arguments = {self.entry: given if self.before is None else self.before(given)}
        if "padding_mask" in tensors:
            arguments["attention_mask"] = tensors["padding_mask"]
        else:  # nothing is padded
            masks["bidirectional"] = None
            if self.needs_mask:
                arguments["attention_mask"] = ones_like_rows(arguments[self.entry])
        clamped = _AlwaysClamped() if torch.compiler.is_compiling() else nullcontext()
        with provide_masks(self.encoder, masks), clamped:
            hidden = self.encoder(**arguments)[0]
        if self.projection is not None:
            hidden = self.projection(hidden)
        result = {}
        for index, (keys, values) in enumerate(self.cross(hidden)):
            result[f"cross_key_values.{index}.key"] = keys
            result[f"cross_key_values.{index}.value"] = values
        return result


def ones_like_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A padding mask ``[batch, positions]`` int64 without padding."""
    return tensor.new_ones(tensor.shape[:2], dtype=torch.int64)


class _AlwaysClamped(TorchFunctionMode):
    """Lets layers clamp float16 always that clamp it where it overflowed: a trace cannot ask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.isfinite:
            return SimpleNamespace(all=lambda: False)
        return func(*args, **(kwargs or {}))


class _KeptBatch(TorchFunctionMode):
    """Keeps the first axis where a decoder drops it of a single row: a trace is for any number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.squeeze and args[1:] == (0,) and args[0].shape[0] != 1:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Projections(nn.Module):
    """The keys and values of all layers, by their projections."""

    def __init__(self, decoder: PreTrainedModel, attention: CrossAttention) -> None:
        super().__init__()
        self.project = decoder.get_submodule(attention.project) if attention.project else None
        layers = decoder.get_submodule(attention.list_path).children()
        self.layers = nn.ModuleList(
            _CrossKeys(layer.get_submodule(attention.key), layer.get_submodule(attention.value), of)
            for layer, of in zip(layers, attention.layers, strict=True)
        )

    def forward(self, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.project is not None:
            hidden = self.project(hidden)
        return [layer(hidden) for layer in self.layers]


class _FirstStep(nn.Module):
    """The keys and values of all layers, as a run of the decoder on one position caches them.

    What else it computes leads to no output, and is no part of the graph.
    """

    def __init__(self, decoder: PreTrainedModel, attention: CrossAttention) -> None:
        super().__init__()
        self.width = int(decoder.get_input_embeddings().weight.shape[1])
        self.decoder = experts_in_turn(rotary_by_length(attention.decoder(decoder)))
        self.attention = attention

    def forward(self, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        one = (hidden.shape[0], 1)
        masks: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: hidden.new_zeros(*one, 1, 1) for mask in self.attention.layout.masks
        }
        own, cross = DynamicCache(), DynamicCache()
        arguments: dict[str, Any] = {
            "encoder_hidden_states": hidden.clone(),  # some add to them in place
            "use_cache": True,
            cache_argument(self.decoder.forward): EncoderDecoderCache(own, cross),
        }
        if self.attention.masked:
            masks["bidirectional"] = hidden.new_zeros(*one, 1, hidden.shape[1])
            arguments[CROSS_MASK] = hidden.new_ones(hidden.shape[:2], dtype=torch.int64)
        with (
            provide_masks(self.decoder, masks),
            on_embeddings(self.decoder, hidden.new_zeros(*one, self.width)) as entry,
        ):
            self.decoder(**arguments, **entry)
        return [(layer.keys, layer.values) for layer in cross.layers]


class _CrossKeys(nn.Module):
    """The keys and values of one layer."""

    def __init__(self, keys: nn.Module, values: nn.Module, of: CacheLayer) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.heads = [int(spec.shape[1]) for spec in of]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.heads
        return _split(self.keys(hidden), keys), _split(self.values(hidden), values)


def _split(states: torch.Tensor, heads: int) -> torch.Tensor:
    batch, positions, width = states.shape
    return states.view(batch, positions, heads, width // heads).transpose(1, 2)


class CrossDecoderPart(nn.Module):
    """A decoder with its masks, positions and both caches as plain tensors.

    Args:
        decoder: The decoder.
        attention: Its caches and masks, from `probe_cross_attention`.
        table: The embedding of ``input_ids``, or ``None`` if the input is embeddings.
        head: The module from hidden states to logits, or ``None`` if the output is hidden states.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        attention: CrossAttention,
        table: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.decoder = experts_in_turn(rotary_by_length(attention.decoder(decoder)))
        self.attention = attention
        weight = getattr(decoder.get_submodule(attention.project or ""), "weight", None)
        self.encoder_width = attention.states if weight is None else int(weight.shape[1])
        self.table = table
        self.head = head

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the decoder.

        Args:
            tensors: ``inputs_embeds`` or ``input_ids``, and those of `CrossAttention.host_inputs`,
                dots as double underscores.

        Returns:
            ``last_hidden_state`` or ``logits``, and the cache with the new positions.
        """
        embeds = (
            tensors["inputs_embeds"] if self.table is None else self.table(tensors["input_ids"])
        )
        layers = self.attention.layers
        cross = filled_cache(layers, tensors, "cross_key_values")
        own = self.attention.layout.cache
        cache = EncoderDecoderCache(filled_cache(own, tensors, "past_key_values"), cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        masks: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: tensors[mask.name] for mask in self.attention.layout.masks
        }
        arguments: dict[str, Any] = {
            "attention_mask": tensors["padding_mask"],
            # Only makes the layers attend; the keys and values are in the cache.
            "encoder_hidden_states": embeds
            if self.encoder_width is None
            else embeds.new_zeros((*embeds.shape[:2], self.encoder_width)),
            "use_cache": True,
            cache_argument(self.decoder.forward): cache,
        }
        if self.attention.masked:
            mask = tensors[CROSS_MASK]  # some decoders look for an entry of each query
            masks["bidirectional"] = mask.expand(-1, -1, embeds.shape[1], -1)
            arguments[CROSS_MASK] = tensors[CROSS_PADDING]
        if "position_ids" in inspect.signature(self.decoder.forward).parameters:
            arguments["position_ids"] = tensors["position_ids"]
        kept = _KeptBatch() if torch.compiler.is_compiling() else nullcontext()
        with provide_masks(self.decoder, masks), kept, on_embeddings(self.decoder, embeds) as entry:
            hidden = self.decoder(**arguments, **entry)[0]
        result = {"last_hidden_state": hidden}
        if isinstance(self.head, HeadStub):
            result = {"logits": self.head(hidden)}
        elif self.head is not None:
            result = self.head(hidden)
        for index, layer in enumerate(cache.self_attention_cache.layers):
            result[f"present.{index}.key"] = layer.keys
            result[f"present.{index}.value"] = layer.values
        return result


def decoder_parts(
    model: PreTrainedModel,
    attention: CrossAttention,
    sites: tuple[Site, Site],
    kind: Kind,
    length: int | str = "sequence",
) -> tuple[Part, ...]:
    """The parts of a model that run at each step.

    Args:
        model: The uncut model.
        attention: Of its decoder.
        sites: The decoder's embedding, and the head.
        kind: ``"split"`` for embedding, body and head; else one part, ``model``.
        length: Number of the encoder's positions, or the name of that axis.
    """
    decoder = decoder_of(model)
    dtype = dtype_name(model.dtype)
    table, linear = (model.get_submodule(site.module) for site in sites)
    width, vocabulary = int(table.weight.shape[1]), int(linear.weight.shape[0])
    head = head_of(model)
    ids = TensorSpec("input_ids", "int64", ("batch", "query"))
    embeds = TensorSpec("inputs_embeds", dtype, ("batch", "query", width))
    hidden = TensorSpec("last_hidden_state", dtype, ("batch", "query", int(linear.weight.shape[1])))
    logits = TensorSpec("logits", dtype, ("batch", "query", vocabulary))
    steps = attention.host_inputs(dtype, length)
    present = attention.layout.cache_outputs()
    masks = attention.layout.masks
    if kind == "split":
        body = CrossDecoderPart(decoder, attention)
        return (
            Part("embedding", EmbeddingPart(table), (ids,), (embeds,), "vocabulary"),
            Part("body", body, (embeds, *steps), (hidden, *present), "body", masks),
            Part("lm_head", head, (hidden,), (logits,), "vocabulary"),
        )
    ends: tuple[nn.Module, nn.Module | None] = (table, head)
    if kind == "stub":
        ends = (EmbeddingStub(width, model.dtype), HeadStub())
        logits = TensorSpec("logits", dtype, hidden.shape)
    whole = CrossDecoderPart(decoder, attention, *ends)
    return (Part("model", whole, (ids, *steps), (logits, *present), "model", masks),)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without the LM head, which some have in it: a causal LM beside any encoder."""
    decoder: PreTrainedModel = model.get_decoder()
    head = model.get_output_embeddings()
    if any(one is head for one in decoder.modules()):
        path = decoder_path_of(decoder)
        if path is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no decoder apart from its LM head",
                "A plugin for this model type can build its parts in another way.",
            )
        return decoder.get_submodule(path)
    return decoder


def projection_of(model: PreTrainedModel) -> nn.Linear | None:
    """What brings an encoder's hidden states to the width of a decoder of another family."""
    return getattr(model, "enc_to_dec_proj", None)


def head_of(model: PreTrainedModel) -> HeadPart:
    """The part that makes logits of the decoder's hidden states."""
    decoder, encoder = decoder_of(model), model.get_encoder()
    head = model.get_output_embeddings()
    if decoder is not model.get_decoder():
        model = model.get_decoder()
        part = HeadPart(model, str(path_of(model, decoder)))
    else:
        paths = [path_of(model, one) for one in (decoder, encoder)]
        if paths[0] is None or paths[1] is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no encoder and decoder apart from its LM head",
                "A plugin for this model type can build its parts in another way.",
            )
        part = HeadPart(model, paths[0], paths[1])
    check_head_runs(part, int(head.weight.shape[1]))
    return part


def operations_of_head(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the operations between the head's output and the logits."""
    part, head = head_of(model), model.get_output_embeddings()
    return operations_after(part, str(path_of(part.model, head)), int(head.weight.shape[1]))
