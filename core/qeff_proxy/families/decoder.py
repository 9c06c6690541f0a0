"""The modules that a decoder is cut into.

``EmbeddingPart`` (token ids to embeddings), ``DecoderPart`` (the layers, with their cache as plain
tensors), ``HeadPart`` (hidden states to logits, with the model's operations around its head) and
two stubs. They share the model's submodules and do not change it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from qeff_proxy.families.decoder_cache import (
    cached_tensors,
    filled_cache,
)
from qeff_proxy.families.decoder_layout import DecoderLayout
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.families.model_masks import provide_masks
from qeff_proxy.families.operators import ReplacedOperators
from qeff_proxy.families.own_cache import (
    held_states,
    without_padding,
)
from qeff_proxy.families.past_inputs import lengthened
from qeff_proxy.families.rotary import rotary_by_length
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import MaskKind
from qeff_proxy.tensor_names import PAST_INPUTS


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
        probed: The path in it of the model that has been probed; by default that is itself.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layout: DecoderLayout,
        entry: str,
        exit_name: str,
        probed: str = "",
    ) -> None:
        super().__init__()
        self.decoder = experts_in_turn(rotary_by_length(decoder))
        self.layout = layout
        self.entry = entry
        self.exit_name = exit_name
        self.probed = probed
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
        cache = (
            filled_cache(self.layout.cache, tensors, "past_key_values")
            if own is None
            else own.filled(tensors, "past_key_values")
        )
        held = cache if own is not None and own.in_modules else None
        arguments: dict[str, Any] = {
            self.entry: first.clone() if self.layout.writes else first,
            "attention_mask": padding,
            self.cache_argument: cache if held is None else held["cache"],
            "use_cache": True,
        }
        if self.takes_positions:
            arguments["position_ids"] = tensors["position_ids"]
        tracing = torch.compiler.is_compiling()
        with (
            provide_masks(self.decoder, masks),
            ReplacedOperators() if tracing else nullcontext(),
            held_states(self.decoder.get_submodule(self.probed), held["held"])
            if held
            else nullcontext() as read,
        ):
            outputs = self.decoder(**arguments)
            if read is None:
                present = cache_of(outputs)
            else:  # models that keep states so let padding into them
                is_token = tensors["padding_mask"][:, -1] != 0
                present = {"cache": cache["cache"], "held": without_padding(read(), is_token)}
        result = {self.exit_name: outputs[0]}
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
