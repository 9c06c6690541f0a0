"""The parts of a model with an encoder and a decoder, found by running both once.

The encoder part also computes the keys and values of every decoder layer's cross attention,
``cross_key_values.<layer>.key`` and ``.value``, so that they are computed once and not at each
step. The decoder part takes them with its own cache; one graph serves prefill and decode steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder import (
    DecoderLayout,
    EmbeddingPart,
    EmbeddingStub,
    HeadPart,
    HeadStub,
)
from qeff_proxy.families.decoder_cache import CacheLayer, describe_cache, filled_cache
from qeff_proxy.families.generic import check_head_runs, path_of
from qeff_proxy.families.model_cache import cache_argument
from qeff_proxy.families.model_masks import MASK_NAMES, provide_masks, record_masks
from qeff_proxy.families.rotary import rotary_by_length
from qeff_proxy.parts import Kind, MaskKind, MaskSpec, Part, TensorSpec
from qeff_proxy.sites import Site

#: The additive mask over the encoder's positions, ``[batch, 1, 1, sequence]``, and the same as
#: tokenizers give it, ``[batch, sequence]`` with 1 for a token.
CROSS_MASK = "encoder_attention_mask"
CROSS_PADDING = "encoder_padding_mask"
_QUERY, _SOURCE = 2, 3  # positions of the decoder and of the encoder in the probe


@dataclass(frozen=True)
class CrossAttention:
    """A decoder's inputs besides its embeddings.

    Attributes:
        layout: Its own cache and masks.
        layers: The cross attention's cache.
        list_path: Dotted path of its list of layers.
        key: Dotted path, in a layer, of the projection to the cross attention's keys.
        value: The same of its values.
        masked: Whether it has a mask over the encoder's positions.
    """

    layout: DecoderLayout
    layers: tuple[CacheLayer, ...]
    list_path: str
    key: str
    value: str
    masked: bool

    def cross_specs(self, length: int | str) -> tuple[TensorSpec, ...]:
        """``cross_key_values.<layer>.key`` and ``.value``: ``[batch, heads, length, width]``."""
        cross = DecoderLayout(self.layers, ())
        return cross.cache_specs("cross_key_values", length)

    def host_inputs(self, dtype: str, length: int | str) -> tuple[TensorSpec, ...]:
        """Masks, positions and both caches: a decoder part's inputs after its first."""
        masks = (
            (
                TensorSpec(CROSS_MASK, dtype, ("batch", 1, 1, length)),
                TensorSpec(CROSS_PADDING, "int64", ("batch", length)),
            )
            if self.masked
            else ()
        )
        return (*masks, *self.layout.host_inputs(dtype), *self.cross_specs(length))


def probe_cross_attention(
    decoder: PreTrainedModel, width: int, encoder_width: int
) -> CrossAttention:
    """Run a decoder on two embeddings and three of the encoder's hidden states.

    Args:
        decoder: A model that takes ``inputs_embeds`` and ``encoder_hidden_states``.
        width: Of its embeddings.
        encoder_width: Of the hidden states.

    Raises:
        UnsupportedModelError: It cannot be run so, or keeps something else than keys and values
            that a projection makes of the hidden states.
    """
    name = type(decoder).__name__
    device = next(p for p in decoder.parameters() if not p.is_meta).device
    made = {"dtype": decoder.dtype, "device": device}
    states = torch.zeros(1, _SOURCE, encoder_width, **made)
    own, cross = DynamicCache(), DynamicCache()
    masks: dict[MaskKind, MaskSpec] = {}
    arguments: dict[str, Any] = {
        "inputs_embeds": torch.zeros(1, _QUERY, width, **made),
        "encoder_hidden_states": states,
        "use_cache": True,
        cache_argument(decoder.forward): EncoderDecoderCache(own, cross),
    }
    takes = inspect.signature(decoder.forward).parameters
    if CROSS_MASK in takes:
        arguments[CROSS_MASK] = torch.ones(1, _SOURCE, dtype=torch.int64, device=device)
    missing = set(arguments) - set(takes)
    if missing:
        raise UnsupportedModelError(
            f"{name} takes no {min(missing)}, so it cannot be run apart from its encoder",
            "A plugin for this model type can build its parts in another way.",
        )
    try:
        with (
            torch.no_grad(),
            record_masks(decoder, masks),
            _numbered(decoder, states) as paths,
        ):
            decoder(**arguments)
    except Exception as error:  # whatever a model's code raises on inputs it is not made for
        raise UnsupportedModelError(
            f"{name} cannot be run on embeddings and its encoder's hidden states: "
            f"{type(error).__name__}: {first_line(error)}",
            "A plugin for this model type can run it in another way.",
        ) from error
    key = value = None
    if own.layers and len(own.layers) == len(cross.layers):
        key = _path_of_number(paths, cross.layers[0].keys)
        value = _path_of_number(paths, cross.layers[0].values)
    if key is None or value is None:
        raise UnsupportedModelError(
            f"the cross attention of {name} keeps something else than keys and values that its "
            "layers project from the encoder's hidden states",
            "A plugin for this model type can build its parts in another way.",
        )
    list_path, key = _in_list(decoder, key)
    value = value.removeprefix(f"{list_path}.0.")
    kinds = [k for k in masks if k != "bidirectional"]
    own_masks = tuple(replace(masks[kind], name=MASK_NAMES[kind]) for kind in kinds)
    layout = DecoderLayout(_cache_layers(own), own_masks)
    return CrossAttention(
        layout, _cache_layers(cross), list_path, key, value, "bidirectional" in masks
    )


@contextmanager
def _numbered(decoder: nn.Module, states: torch.Tensor) -> Iterator[list[str]]:
    """Let each module that is run on hidden states of the encoder give its number, from 1.

    Yields the paths of these modules. Hooks will not do, since those in a layer are called only
    after it where layers are marked; nor will values, since weights may be all zeros.
    """
    paths: list[str] = []

    def wrapped(path: str, module: nn.Module) -> Any:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not args or getattr(args[0], "shape", None) != states.shape:
                return output
            paths.append(path)
            return torch.full_like(output, len(paths))

        return run

    leaves = [
        (path, module)
        for path, module in decoder.named_modules()
        if not any(True for _ in module.children()) and "forward" not in vars(module)
    ]
    try:
        for path, module in leaves:
            vars(module)["forward"] = wrapped(path, module)
        yield paths
    finally:
        for _, module in leaves:
            vars(module).pop("forward", None)


def _path_of_number(paths: list[str], states: torch.Tensor) -> str | None:
    """The module that gave all of these keys or values; ``None`` where no single one did."""
    number = int(states.flatten()[0])
    same = bool((states == number).all()) and 0 < number <= len(paths)
    return paths[number - 1] if same else None


def _in_list(decoder: nn.Module, path: str) -> tuple[str, str]:
    """The list of layers that a module of the first layer is in, and its path in the layer."""
    names = path.split(".")
    for end in range(1, len(names)):
        if names[end] == "0" and isinstance(
            decoder.get_submodule(".".join(names[:end])), nn.ModuleList
        ):
            return ".".join(names[:end]), ".".join(names[end + 1 :])
    raise UnsupportedModelError(
        f"{path} of {type(decoder).__name__}, which makes the keys of its cross attention, is in "
        "no list of layers",
        "A plugin for this model type can build its parts in another way.",
    )


def _cache_layers(cache: DynamicCache) -> tuple[CacheLayer, ...]:
    return tuple(describe_cache(layer) for layer in cache.layers)


class EncoderPart(nn.Module):
    """An encoder, with the keys and values of every decoder layer's cross attention.

    Args:
        encoder: The encoder.
        decoder: The decoder.
        attention: Of the decoder.
        entry: The encoder's argument that the part's first input goes to.
        first: The name of that input.
        masks: The attention masks that the encoder makes.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel,
        attention: CrossAttention,
        entry: str,
        first: str,
        masks: tuple[MaskSpec, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = rotary_by_length(encoder)
        self.entry = entry
        self.first = first
        self.masks = masks
        layers = decoder.get_submodule(attention.list_path).children()
        self.cross = nn.ModuleList(
            _CrossKeys(layer.get_submodule(attention.key), layer.get_submodule(attention.value), of)
            for layer, of in zip(layers, attention.layers, strict=True)
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
        arguments = {self.entry: tensors[self.first]}
        if "padding_mask" in tensors:
            arguments["attention_mask"] = tensors["padding_mask"]
        else:  # nothing is padded
            masks["bidirectional"] = None
        clamped = _AlwaysClamped() if torch.compiler.is_compiling() else nullcontext()
        with provide_masks(self.encoder, masks), clamped:
            hidden = self.encoder(**arguments)[0]
        result = {}
        for index, cross in enumerate(self.cross):
            keys, values = cross(hidden)
            result[f"cross_key_values.{index}.key"] = keys
            result[f"cross_key_values.{index}.value"] = values
        return result


class _AlwaysClamped(TorchFunctionMode):
    """Lets layers clamp float16 always that clamp it where it overflowed: a trace cannot ask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.isfinite:
            return SimpleNamespace(all=lambda: False)
        return func(*args, **(kwargs or {}))


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
        self.decoder = rotary_by_length(decoder)
        self.attention = attention
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
            "inputs_embeds": embeds,
            "attention_mask": tensors["padding_mask"],
            # Only makes the layers attend; the keys and values are in the cache.
            "encoder_hidden_states": embeds,
            "use_cache": True,
            cache_argument(self.decoder.forward): cache,
        }
        if self.attention.masked:
            mask = tensors[CROSS_MASK]  # some decoders look for an entry of each query
            masks["bidirectional"] = mask.expand(-1, -1, embeds.shape[1], -1)
            arguments[CROSS_MASK] = tensors[CROSS_PADDING]
        if "position_ids" in inspect.signature(self.decoder.forward).parameters:
            arguments["position_ids"] = tensors["position_ids"]
        with provide_masks(self.decoder, masks):
            hidden = self.decoder(**arguments)[0]
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
    decoder = model.get_decoder()
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


def head_of(model: PreTrainedModel) -> HeadPart:
    """The part that makes logits of the decoder's hidden states."""
    decoder, encoder = model.get_decoder(), model.get_encoder()
    paths = [path_of(model, one) for one in (decoder, encoder)]
    head = model.get_output_embeddings()
    if paths[0] is None or paths[1] is None or any(one is head for one in decoder.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no encoder and decoder apart from its LM head",
            "A plugin for this model type can build its parts in another way.",
        )
    part = HeadPart(model, paths[0], paths[1])
    check_head_runs(part, int(head.weight.shape[1]))
    return part
