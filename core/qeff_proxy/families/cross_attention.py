"""The cross attention of a decoder: its cache and projections, found by running the model once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder_cache import CacheLayer, describe_cache
from qeff_proxy.families.decoder_layout import DecoderLayout
from qeff_proxy.families.given_embeddings import (
    needs_given,
    on_embeddings,
    takes_embeddings,
    with_given_embeddings,
)
from qeff_proxy.families.model_cache import cache_argument
from qeff_proxy.families.model_masks import MASK_NAMES, record_masks
from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.parts import MaskKind, MaskSpec, TensorSpec

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
        project: Dotted path of a module that the hidden states go through before any layer.
        states: Width of the hidden states, where the keys and values are more than projections of
            them: then ``key`` and ``value`` are empty, and the decoder itself makes them.
        given: Whether it runs on given embeddings (`qeff_proxy.families.given_embeddings`).
    """

    layout: DecoderLayout
    layers: tuple[CacheLayer, ...]
    list_path: str
    key: str
    value: str
    masked: bool
    project: str | None = None
    states: int | None = None
    given: bool = False

    def decoder(self, decoder: ModuleT) -> ModuleT:
        """The decoder, or a copy of it that runs on given embeddings."""
        table: Any = decoder.get_input_embeddings
        return with_given_embeddings(decoder, table()) if self.given else decoder

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
        decoder: A model that takes ``encoder_hidden_states``.
        width: Of its embeddings.
        encoder_width: Of the hidden states.

    Raises:
        UnsupportedModelError: It cannot be run so, or keeps something else than keys and values.
    """
    name = type(decoder).__name__
    takes = inspect.signature(decoder.forward).parameters
    missing = {"encoder_hidden_states", cache_argument(decoder.forward)} - set(takes)
    if missing:
        raise UnsupportedModelError(
            f"{name} takes no {min(missing)}, so it cannot be run apart from its encoder",
            "A plugin for this model type can build its parts in another way.",
        )
    problem: Exception | None = None
    for given in (False, True) if takes_embeddings(decoder) else (True,):
        try:  # some need token ids, though they take embeddings
            one = (
                with_given_embeddings(decoder, decoder.get_input_embeddings()) if given else decoder
            )
            return _probed(one, width, encoder_width)
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a model's code raises on such inputs)
            problem = problem or error
    assert problem is not None  # noqa: S101 (the loop ran)
    raise UnsupportedModelError(
        f"{name} cannot be run on embeddings and its encoder's hidden states: "
        f"{type(problem).__name__}: {first_line(problem)}",
        "A plugin for this model type can run it in another way.",
    ) from problem


def _probed(decoder: PreTrainedModel, width: int, encoder_width: int) -> CrossAttention:
    """The cross attention of a decoder that runs on embeddings, be they given."""
    name = type(decoder).__name__
    device = next(p for p in decoder.parameters() if not p.is_meta).device
    made = {"dtype": decoder.dtype, "device": device}
    states = torch.zeros(1, _SOURCE, encoder_width, **made)
    own, cross = DynamicCache(), DynamicCache()
    masks: dict[MaskKind, MaskSpec] = {}
    arguments: dict[str, Any] = {
        "encoder_hidden_states": states,
        "use_cache": True,
        cache_argument(decoder.forward): EncoderDecoderCache(own, cross),
    }
    if CROSS_MASK in inspect.signature(decoder.forward).parameters:
        arguments[CROSS_MASK] = torch.ones(1, _SOURCE, dtype=torch.int64, device=device)
    with (
        torch.no_grad(),
        record_masks(decoder, masks),
        _numbered(decoder, states) as paths,
        on_embeddings(decoder, torch.zeros(1, _QUERY, width, **made)) as entry,
    ):
        decoder(**arguments, **entry)
    if not own.layers or [cached.keys.shape[2:3] for cached in cross.layers] != [(_SOURCE,)] * len(
        own.layers
    ):
        raise UnsupportedModelError(
            f"the cross attention of {name} keeps something else than keys and values of its "
            "encoder's hidden states",
            "A plugin for this model type can build its parts in another way.",
        )
    kinds = [k for k in masks if k != "bidirectional"]
    own_masks = tuple(replace(masks[kind], name=MASK_NAMES[kind]) for kind in kinds)
    found = CrossAttention(
        DecoderLayout(_cache_layers(own), own_masks),
        _cache_layers(cross),
        list_path="",
        key="",
        value="",
        masked="bidirectional" in masks,
        states=encoder_width,
        given=needs_given(decoder),
    )
    key = _path_of_number(paths, cross.layers[0].keys)
    value = _path_of_number(paths, cross.layers[0].values)
    if key is None or value is None or bool(states.any()):  # some add to them in place
        return found
    list_path, key = _in_list(decoder, key)
    before = [path for path in paths[:2] if not path.startswith(f"{list_path}.")]
    if len(before) > 1:
        return found
    value = value.removeprefix(f"{list_path}.0.")
    project = before[0] if before else None
    return replace(found, list_path=list_path, key=key, value=value, project=project, states=None)


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
