"""The modules that a decoder is cut into.

``EmbeddingPart`` (token ids to embeddings), ``DecoderPart`` (the layers, with their cache as plain
tensors), ``HeadPart`` (hidden states to logits, with the model's operations around its head) and
two stubs. They share the model's submodules and do not change it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.families.decoder_cache import (
    CacheLayer,
    cached_tensors,
    describe_cache,
    filled_cache,
    is_known,
    new_cache,
    without_window,
)
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.families.model_cache import cache_argument, cache_of, has_cache
from qeff_proxy.families.model_masks import provide_masks, record_masks
from qeff_proxy.families.operators import ReplacedOperators
from qeff_proxy.families.own_cache import OwnCache, find_own_cache
from qeff_proxy.families.past_inputs import PAST_INPUTS, check_causal, lengthened, past_inputs
from qeff_proxy.families.rotary import rotary_by_length
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import MaskKind, MaskSpec, TensorSpec


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
        return 1 if "recurrent" in names else "query"

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
    try:
        return _probe_cache(decoder, hidden_size, dtype)
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

    own = None
    try:
        outputs, writes = run(1, 2, **{argument: cache})
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        with suppress(RuntimeError, LookupError, AttributeError, TypeError, ValueError):
            own = find_own_cache(lambda *sizes: cache_of(run(*sizes)[0]))
        if own is None:
            # Where a layer keeps another state, the model needs a cache made for its config.
            for index, layer in enumerate(DynamicCache(config=decoder.config).layers):
                if not is_known(without_window(layer)):
                    raise _other_state(name, index, layer) from error
            raise UnsupportedModelError(
                f"{name} does not run on embeddings and a cache: {type(error).__name__}: "
                f"{first_line(error)}",
                "A plugin for this model type can run it with a cache of its own.",
            ) from error
        outputs, writes = run(1, 2)
    for index, layer in enumerate(cache.layers if own is None else ()):
        if not is_known(layer):
            raise _other_state(name, index, layer)
    layers = tuple(map(describe_cache, cache.layers)) if own is None else own.layers
    if not any(layers) or not has_cache(outputs):
        raise UnsupportedModelError(
            f"{name} {'returns its cache nowhere' if any(layers) else 'keeps no cache'}", "A plugin for this model type can run it in another way."
        )
    return DecoderLayout(layers, tuple(masks.values()), dtype_name(outputs[0].dtype), writes, own)


def _other_state(name: str, index: int, layer: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {index} of {name} caches something else than keys, values and states of "
        f"convolutions and recurrent layers ({type(layer).__name__})",
        "The generic plugin does not support it; write a plugin for this model type.",
    )


class EmbeddingPart(nn.Module):
    """``input_ids`` to ``inputs_embeds``, by the model's own embedding module."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """``input_ids [batch, sequence]`` to ``inputs_embeds [batch, sequence, hidden]``."""
        return {"inputs_embeds": self.embedding(input_ids)}


class DecoderPart(nn.Module):
    """A decoder with its masks, positions and cache as plain tensors.

    Args:
        decoder: A model without its ends, or a whole causal LM.
        layout: Its cache and masks, from `probe_decoder`.
        entry: The name of its first input, ``"inputs_embeds"`` or ``"input_ids"``.
        exit_name: The name of its first output, ``"last_hidden_state"`` or ``"logits"``.
    """

    def __init__(
        self, decoder: nn.Module, layout: DecoderLayout, entry: str, exit_name: str
    ) -> None:
        super().__init__()
        self.decoder = experts_in_turn(rotary_by_length(decoder))
        self.layout = layout
        self.entry = entry
        self.exit_name = exit_name
        self.cache_argument = cache_argument(decoder.forward)
        self.takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the decoder.

        Args:
            tensors: ``entry``, the masks, ``padding_mask [batch, past + query]`` int64 (for models
                that derive more than a mask from it, such as ALiBi), ``position_ids [batch,
                query]`` int64, and the cache, dots written as double underscores.

        Returns:
            ``exit_name`` and the cache, one query longer.
        """
        masks: dict[MaskKind, torch.Tensor | None] = {
            mask.kind: tensors[mask.name] for mask in self.layout.masks
        }
        padding = tensors["padding_mask"]
        if self.layout.runs_again:
            return self._over_all(tensors, masks)
        if not self.layout.keeps_positions:  # such models take that of the new positions
            padding = padding[:, -tensors[self.entry].shape[1] :]
        first, own = tensors[self.entry], self.layout.own
        arguments: dict[str, Any] = {
            self.entry: first.clone() if self.layout.writes else first,
            "attention_mask": padding,
            self.cache_argument: filled_cache(self.layout.cache, tensors, "past_key_values")
            if own is None
            else own.filled(tensors, "past_key_values"),
            "use_cache": True,
        }
        if self.takes_positions:
            arguments["position_ids"] = tensors["position_ids"]
        tracing = torch.compiler.is_compiling()
        with provide_masks(self.decoder, masks), ReplacedOperators() if tracing else nullcontext():
            outputs = self.decoder(**arguments)
        result = {self.exit_name: outputs[0]}
        present = cache_of(outputs)
        if own is not None:
            return result | {f"present.{name}": one for name, one in own.tensors(present).items()}
        for index, layer in enumerate(present.layers):
            for name, tensor in cached_tensors(layer).items():
                result[f"present.{index}.{name}"] = tensor
        return result

    def _over_all(
        self, tensors: Mapping[str, torch.Tensor], masks: Mapping[MaskKind, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Run the decoder over all positions; masks and positions are those of all, too."""
        past, new = tensors[f"past_key_values__0__{PAST_INPUTS}"], tensors[self.entry]
        every = lengthened(past, new)
        arguments: dict[str, Any] = {
            self.entry: every.clone() if new.dim() == every.dim() else every[..., 0],
            "attention_mask": tensors["padding_mask"],
            "use_cache": False,
        }
        if self.takes_positions:
            arguments["position_ids"] = tensors["position_ids"]
        tracing = torch.compiler.is_compiling()
        with provide_masks(self.decoder, masks), ReplacedOperators() if tracing else nullcontext():
            output = self.decoder(**arguments)[0]
        return {
            self.exit_name: output[:, past.shape[2] :],
            f"present.0.{PAST_INPUTS}": every[:, None],
        }


@dataclass
class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """The decoder's outputs; whatever else causal LMs read of them is ``None``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@dataclass
class _EncoderOutput(BaseModelOutput):  # type: ignore[misc]
    """The same of an encoder."""

    __getattr__ = _DecoderOutput.__getattr__


class _Passthrough(nn.Module):
    """Replaces the decoder; returns the embeddings unchanged, and has the decoder's attributes.

    A model may read a scale from there for its logits.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = (decoder,)  # in a tuple, so that it is no part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.decoder[0], name)

    def forward(
        self, *_args: Any, inputs_embeds: torch.Tensor | None = None, **_kwargs: Any
    ) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


class HeadPart(nn.Module):
    """``last_hidden_state`` to ``logits``.

    The model itself with a passthrough in place of its decoder, so that this part also has the
    operations before and after the head (a scale, a soft cap).

    Args:
        model: The causal LM, or one with an encoder.
        decoder_path: Dotted path of the decoder in it.
        encoder_path: The same of its encoder; ``None`` where it has none.
    """

    def __init__(
        self, model: PreTrainedModel, decoder_path: str, encoder_path: str | None = None
    ) -> None:
        super().__init__()
        paths = filter(None, (decoder_path, encoder_path))
        passed = {path: _Passthrough(model.get_submodule(path)) for path in paths}
        self.model = replace_modules(model, passed)
        steps = decoder_path.split(".")
        for count in range(len(steps)):  # the modules that are copies
            module = self.model.get_submodule(".".join(steps[:count]))
            if hasattr(module, "rope_deltas"):  # of the last prompt that the model has seen
                module.rope_deltas = None
        self.has_encoder = encoder_path is not None

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[batch, sequence, hidden]`` to ``logits [batch, sequence, vocabulary]``."""
        arguments: dict[str, Any] = {"inputs_embeds": last_hidden_state}
        if self.has_encoder:
            arguments = {
                "decoder_inputs_embeds": last_hidden_state,
                "encoder_outputs": _EncoderOutput(last_hidden_state=last_hidden_state),
            }
        outputs = self.model(**arguments, use_cache=False)
        return {"logits": outputs.logits}


class EmbeddingStub(nn.Module):
    """Broadcasts a token's id over the hidden size. Has no weights and no meaning."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.dtype = dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[batch, sequence]`` to ``[batch, sequence, hidden]``."""
        shape: Sequence[int] = (*input_ids.shape, self.hidden_size)
        return input_ids.to(self.dtype).unsqueeze(-1).expand(shape)


class HeadStub(nn.Module):
    """Passes hidden states through. Has no weights and no meaning."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return hidden_states
