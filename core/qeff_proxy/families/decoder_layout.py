"""What a decoder takes beside its embeddings, and what it caches, found by running it."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder_cache import (
    CacheLayer,
    describe_cache,
    is_known,
    layers_of,
    new_cache,
    own_states,
    without_window,
)
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.families.model_masks import record_masks
from qeff_proxy.families.own_cache import (
    OwnCache,
    find_held_states,
    find_own_cache,
    held_states,
)
from qeff_proxy.families.past_inputs import check_causal, past_inputs
from qeff_proxy.parts import MaskKind, MaskSpec, TensorSpec
from qeff_proxy.tensor_names import PAST_INPUTS


@dataclass(frozen=True)
class DecoderLayout:
    """The inputs of a decoder besides its embeddings, found by running it once.

    Attributes:
        cache: What each layer caches, in order; nothing for a layer without a cache.
        masks: The attention masks it uses.
        hidden_dtype: Of its output, where that is not the weights'.
        writes: Whether it changes its embeddings in place.
        own: The cache of the model's own class; ``None`` for one of transformers.
    """

    cache: tuple[CacheLayer, ...]
    masks: tuple[MaskSpec, ...]
    hidden_dtype: str | None = None
    writes: bool = False
    own: OwnCache | None = None

    @property
    def runs_again(self) -> bool:
        """Whether it runs over all positions at each step: `qeff_proxy.families.past_inputs`."""
        return any(spec.name == PAST_INPUTS for layer in self.cache for spec in layer)

    @property
    def query(self) -> int | str:
        """The axis of the new positions: ``"query"``, or 1 where a layer has a recurrent state.

        Models scan several positions in chunks of a fixed number, which a trace freezes; they
        compute a single position by other code.
        """
        names = {spec.name.partition("_state")[0] for layer in self.cache for spec in layer}
        held = self.own is not None and self.own.in_modules
        return 1 if held or "recurrent" in names else "query"

    @property
    def keeps_positions(self) -> bool:
        """Whether a layer caches keys and values, and not states alone."""
        return any("past" in spec.shape for layer in self.cache for spec in layer)

    def cache_inputs(self) -> tuple[TensorSpec, ...]:
        """``past_key_values.<layer>.key``, ``.value`` and states: `CacheLayer`."""
        return self.cache_specs("past_key_values", "past")

    def cache_outputs(self) -> tuple[TensorSpec, ...]:
        """``present.<layer>.key`` …: the same; keys and values are one query longer."""
        return self.cache_specs("present", f"past + {self.query}")

    def host_inputs(self, dtype: str) -> tuple[TensorSpec, ...]:
        """Masks, positions and cache: a decoder part's inputs after its first."""
        keys = f"past + {self.query}"
        rows = keys if self.runs_again else self.query
        masks = tuple(TensorSpec(mask.name, dtype, ("batch", 1, rows, keys)) for mask in self.masks)
        return (
            *masks,
            TensorSpec("padding_mask", "int64", ("batch", keys)),
            TensorSpec("position_ids", "int64", ("batch", rows)),
            *self.cache_inputs(),
        )

    def cache_specs(self, prefix: str, length: int | str) -> tuple[TensorSpec, ...]:
        """``<prefix>.<layer>.<name>``, ``length`` long where keys and values grow."""
        return tuple(
            TensorSpec(
                f"{prefix}.{index}.{spec.name}",
                spec.dtype,
                tuple(length if axis == "past" else axis for axis in spec.shape),
            )
            for index, layer in enumerate(self.cache)
            for spec in layer
        )


def probe_decoder(decoder: nn.Module, hidden_size: int, dtype: torch.dtype) -> DecoderLayout:
    """Run ``decoder`` on a few embeddings, and record which masks it uses and what it caches.

    One that caches nothing, or something else than keys, values and states, is to be given all
    embeddings again at each step.

    Args:
        decoder: A model that takes ``inputs_embeds``.
        hidden_size: Width of the embeddings.
        dtype: Their dtype.

    Raises:
        UnsupportedModelError: It takes no embeddings, or its cache is unknown and it cannot run
            without one.
    """
    name = type(decoder).__name__
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no inputs_embeds, so it cannot run without its token embedding",
            "A plugin for this model type can build its body in another way.",
        )
    for index, layer in enumerate(layers_of(decoder.config)):
        if own_states(layer):  # whose masks may follow from them, too
            raise _other_state(name, index, layer)
    try:
        layout = _probe_cache(decoder, hidden_size, dtype)
    except UnsupportedModelError as error:
        masks: dict[MaskKind, MaskSpec] = {}
        try:
            with record_masks(decoder, masks):
                output = check_causal(decoder, hidden_size, dtype)
        except UnsupportedModelError as other:
            raise UnsupportedModelError(f"{error.problem}; {other.problem}", error.hint) from other
        layers = (past_inputs(dtype_name(dtype), hidden_size),)
        # Some change their embeddings in place, and these are still to be returned.
        return DecoderLayout(layers, tuple(masks.values()), dtype_name(output.dtype), writes=True)
    for index, layer in enumerate(layout.cache):
        for spec in layer:
            if 0 in spec.shape:
                raise UnsupportedModelError(
                    f"layer {index} of {name} caches a {spec.name} that is 0 wide, of which ONNX "
                    "makes no graph",
                    "A plugin for this model type can leave it out.",
                )
    return layout


def _probe_cache(decoder: nn.Module, hidden_size: int, dtype: torch.dtype) -> DecoderLayout:
    """What a decoder caches, and its masks; see `probe_decoder`."""
    name = type(decoder).__name__
    cache = new_cache(decoder.config)
    masks: dict[MaskKind, MaskSpec] = {}
    device = next(decoder.parameters()).device
    argument = cache_argument(decoder.forward)

    def run(rows: int, positions: int, **given: Any) -> tuple[Any, bool]:
        embeddings = torch.zeros(rows, positions, hidden_size, dtype=dtype, device=device)
        with torch.no_grad(), record_masks(decoder, masks):
            outputs = decoder(inputs_embeds=embeddings, use_cache=True, **given)
        return outputs, embeddings._version > 0  # noqa: SLF001 (torch counts changes in place there)

    def run_on(rows: int, positions: int, cache: Any) -> Any:
        return run(rows, positions, **{argument: cache})

    own, outputs = None, None
    errors = RuntimeError, LookupError, AttributeError, TypeError, ValueError
    try:
        outputs, writes = run_on(1, 2, cache)
        cache_of(outputs)
    except errors as error:
        with suppress(*errors):
            own = find_own_cache(lambda *sizes: cache_of(run(*sizes)[0]))
        with suppress(*errors):
            own = own or find_held_states(decoder, run_on)
        if own is None:
            # Where a layer keeps another state, the model needs a cache made for its config.
            for index, layer in enumerate(DynamicCache(config=decoder.config).layers):
                if not is_known(without_window(layer)):
                    raise _other_state(name, index, layer) from error
            reason = f"does not run on embeddings and a cache: {type(error).__name__}"
            raise UnsupportedModelError(
                f"{name} {reason}: {first_line(error)}"
                if outputs is None
                else f"{name} keeps no cache, or not in what it returns",
                "A plugin for this model type can run it with a cache of its own.",
            ) from error
        with held_states(decoder, {}):
            outputs, writes = run(1, 2)
    for index, layer in enumerate(cache.layers if own is None else ()):
        if not is_known(layer):
            raise _other_state(name, index, layer)
    layers = tuple(map(describe_cache, cache.layers)) if own is None else own.layers
    if not any(layers):
        raise UnsupportedModelError(
            f"{name} keeps no cache", "A plugin for this model type can run it in another way."
        )
    return DecoderLayout(layers, tuple(masks.values()), dtype_name(outputs[0].dtype), writes, own)


def _other_state(name: str, index: int, layer: object) -> UnsupportedModelError:
    kept = ", ".join(own_states(layer)) or "keys of another shape"
    return UnsupportedModelError(
        f"layer {index} of {name} caches something else than keys, values and states of "
        f"convolutions and recurrent layers: {kept} ({type(layer).__name__})",
        "The generic plugin does not support it; write a plugin for this model type.",
    )
