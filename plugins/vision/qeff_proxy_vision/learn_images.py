"""Learn from a model itself how images enter its language model.

The model generates a token from a prompt with an image and one without. What its language model is
given meanwhile tells where the features of the image go, how positions are numbered, which tokens
see each other, and what else the images add. Whatever is not understood is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from qeff_proxy.arrays import Array, to_array
from qeff_proxy.common.messages import an
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.flows.causal_engine import position_ids_of
from qeff_proxy.parts import MaskSpec
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import Blocks
from qeff_proxy_vision.positions import Positions
from qeff_proxy_vision.reference import generated_logits

__all__ = ["TYPES", "Learned", "learn_images", "learn_lookups", "learn_sounds"]

#: Processors' outputs that tell image tokens from others.
TYPES = ("token_type_ids", "mm_token_type_ids")
#: What any language model may be given, which the host or the core's decoder part supplies.
_USUAL = frozenset(
    (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "cache",
        "inputs_embeds",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "labels",
        *TYPES,
    )
)
_DEEPSTACK = frozenset(("visual_pos_masks", "deepstack_visual_embeds"))
_KINDS = {"causal": "full_attention", "sliding": "sliding_attention"}
_PER: tuple[Literal["run", "row"], ...] = ("run", "row")
_CLOSE = 1e-4  # of the largest embedding


@dataclass(frozen=True)
class Learned:
    """How images enter a language model.

    Attributes:
        positions: How tokens are numbered, if not by their distance from the first.
        blocks: Which tokens see each other.
        deepstack: The number of layers that further features are added after, from the first on.
    """

    positions: Positions | None
    blocks: Blocks | None
    deepstack: int


def learn_images(
    model: PreTrainedModel,
    decoder: nn.Module,
    sample: Mapping[str, torch.Tensor],
    features: Mapping[str, torch.Tensor],
    token_id: int,
    masks: Sequence[MaskSpec],
) -> Learned:
    """Run the model on a batch of two prompts, of which the second has two images.

    Args:
        model: The model.
        decoder: Its language model.
        sample: The tensors of the batch.
        features: The vision part's outputs for the first: ``image_features [rows, hidden]`` first.
        token_id: The image token.
        masks: The masks of the language model, without blocks.

    Raises:
        UnsupportedModelError: Images do something that is not understood; says what.
    """
    name = type(model).__name__
    arrays = {name: to_array(tensor) for name, tensor in sample.items()}
    first = _seen(model, decoder, arrays, "an image")
    marked = arrays["input_ids"] == token_id
    _check_embeddings(name, first, marked, next(iter(features.values())))
    deepstack = _deepstack(decoder, first, features)
    known = _USUAL | (_DEEPSTACK if deepstack is not None else frozenset())
    _check_others(name, first, known)
    count = len(next(iter(features.values())))
    return Learned(
        _positions(name, first, arrays["attention_mask"], marked, count),
        _blocks(name, first, arrays, masks),
        deepstack or 0,
    )


def learn_sounds(
    model: PreTrainedModel,
    decoder: nn.Module,
    sample: Mapping[str, torch.Tensor],
    features: torch.Tensor,
    token_id: int,
    masks: Sequence[MaskSpec],
    images: Learned | None,
) -> Positions | None:
    """Run the model on a batch of two prompts, of which the second has two sounds.

    Args:
        model: The model.
        decoder: Its language model.
        sample: The tensors of the batch.
        features: Those of both sounds, ``[rows, hidden]``.
        token_id: The token of sounds.
        masks: The masks of the language model, without blocks.
        images: How images enter it, if it takes any.

    Returns:
        How tokens are numbered, if not by their distance from the first, nor as `images` says.

    Raises:
        UnsupportedModelError: Sounds do something that is not understood; says what.
    """
    name = type(model).__name__
    arrays = {name: to_array(tensor) for name, tensor in sample.items()}
    call = _seen(model, decoder, arrays, "a sound")
    _check_embeddings(name, call, arrays["input_ids"] == token_id, features, "sound")
    _check_others(name, call, _USUAL, "sounds")
    if _blocks(name, call, arrays, masks) is not None:
        raise _not_served(name, "the tokens of a sound see each other", "sounds")
    none = np.zeros_like(arrays["input_ids"], dtype=bool)
    return _positions(name, call, arrays["attention_mask"], none, 0, images)


class _SeenError(Exception):
    """Carries what the language model is given, which need not run."""


def _seen(
    model: PreTrainedModel, decoder: nn.Module, arrays: Mapping[str, Array], what: str
) -> dict[str, Any]:
    """What the language model is given in the first step of a generation."""

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        raise _SeenError({name: value for name, value in given.items() if value is not None})

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    name, found = type(model).__name__, "its language model is not run"
    try:
        generated_logits(model, arrays, np.zeros((2, 0), np.int64))
    except _SeenError as seen:
        return dict(seen.args[0])
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        handle.remove()
    raise UnsupportedModelError(
        f"{name} cannot be run on a prompt with {what}: {found}",
        "A plugin for this model type can.",
    )


def learn_lookups(
    model: PreTrainedModel, decoder: nn.Module, tokens: Sequence[int]
) -> dict[int, int]:
    """Find the tokens in whose place the model looks up another, where there is no image.

    Models do so with the tokens that stand for images, video or sound, which a model may generate.

    Args:
        model: The model.
        decoder: Its language model.
        tokens: To be tried.

    Raises:
        UnsupportedModelError: The embedding that the model gives a token is that of no token known.
    """

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        raise _SeenError(given.get("inputs_embeds"))

    table = model.get_input_embeddings()
    found = {}
    for token in tokens:
        ids = torch.tensor([[token]])
        handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except _SeenError as seen:
            (embedding,) = seen.args
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            continue  # the model refuses the token where there is no image
        finally:
            handle.remove()
        if embedding is None or torch.equal(embedding, table(ids)):
            continue
        others = (o for o in (0, *tokens) if torch.equal(embedding, table(torch.tensor([[o]]))))
        other = next(others, None)
        if other is None:
            name = type(model).__name__
            raise _not_served(name, f"the embedding of token {token} is that of no other token")
        found[token] = other
    return found


def _not_served(name: str, what: str, kind: str = "images") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is not served with {kind}: {what}", "A plugin for this model type can cut it."
    )


def _check_others(
    name: str, call: Mapping[str, Any], known: frozenset[str], kind: str = "images"
) -> None:
    """Make sure that the language model is given nothing that is not known."""
    others = [key for key, value in call.items() if key not in known and _is_data(value)]
    if others:
        raise _not_served(name, f"its language model takes {', '.join(others)}", kind)


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_is_data(one) for one in value)
    return isinstance(value, torch.Tensor)


def _check_embeddings(
    name: str,
    call: Mapping[str, Any],
    marked: Array,
    features: torch.Tensor,
    what: str = "image",
) -> None:
    """Make sure that features replace the embeddings of the image tokens."""
    embeddings = call.get("inputs_embeds")
    if embeddings is None:
        raise _not_served(name, "its language model is given no embeddings", f"{what}s")
    placed = embeddings[torch.from_numpy(marked)].float()[: len(features)]
    expected = features.float()
    largest = expected.abs().max().clamp(min=1e-6)
    if placed.shape != expected.shape or (placed - expected).abs().max() > _CLOSE * largest:
        raise _not_served(
            name, f"the features of {an(what)} do not replace the {what} tokens", f"{what}s"
        )


def _deepstack(
    decoder: nn.Module, call: Mapping[str, Any], features: Mapping[str, torch.Tensor]
) -> int | None:
    """The number of layers that further features are added after; ``None`` if not understood."""
    given = call.get("deepstack_visual_embeds")
    own = list(features.values())[1:]
    if not isinstance(given, list | tuple) or not hasattr(decoder, "_deepstack_process"):
        return None
    if len(given) != len(own):
        return None
    equal = all(
        torch.allclose(mine, theirs[: len(mine)], atol=1e-3, rtol=1e-3)
        for mine, theirs in zip(own, given, strict=True)
    )
    return len(own) if equal else None


def _positions(
    name: str,
    call: Mapping[str, Any],
    padding: Array,
    marked: Array,
    count: int,
    images: Learned | None = None,
) -> Positions | None:
    """How the model numbers positions, checked on both prompts; ``None`` where that is known."""
    given = call.get("position_ids")
    if given is None:
        return None
    found = to_array(given)
    found = np.broadcast_to(found, (*found.shape[:-2], *padding.shape))
    valid = padding.astype(bool)
    usual = position_ids_of(padding, padding.shape[1])
    axes = found.shape[0] if found.ndim == 3 else 0
    # Some count padding, too, where only the distance of two positions matters.
    if not axes and any((found == one)[valid].all() for one in (usual, np.arange(len(usual[0])))):
        return None
    planes = found if axes else found[None]
    if not count:  # sounds are numbered like text
        start = int(planes[0, 0, np.flatnonzero(padding[0])[0]])
        plain = Positions(axes, start, ((),) * len(planes), (0,) * len(planes))
        known = images.positions if images is not None else None
        if not ((known or plain).of_prompt(padding, marked)[0] == planes)[:, valid].all():
            raise _not_served(
                name, "it numbers positions in a way that is not understood", "sounds"
            )
        return None if known is not None else plain
    row = int(np.flatnonzero(marked.any(axis=1))[0])
    image = np.flatnonzero(marked[row])[:count]
    begin = planes[:, row, image[0] - 1] + 1
    numbering = Positions(
        axes,
        int(planes[0, 0, np.flatnonzero(padding[0])[0]]),
        tuple(tuple((axis - begin[i]).tolist()) for i, axis in enumerate(planes[:, row, image])),
        tuple((planes[:, row, image[-1] + 1] - begin).tolist()),
    )
    again, _ = numbering.of_prompt(padding, marked)
    if not (again == planes)[:, valid].all():
        raise _not_served(name, "it numbers positions in a way that is not understood")
    return numbering


def _blocks(
    name: str, call: Mapping[str, Any], arrays: Mapping[str, Array], specs: Sequence[MaskSpec]
) -> Blocks | None:
    """Which tokens see each other, from the masks that the language model is given."""
    given = call.get("attention_mask")
    by_kind = given if isinstance(given, Mapping) else {"full_attention": given}
    seen = {
        spec.name: to_array(mask.float())[:, 0] > -1.0
        for spec in specs
        for mask in [by_kind.get(_KINDS.get(spec.kind, ""))]
        if isinstance(mask, torch.Tensor) and mask.dim() == 4
    }
    if not seen:
        return None  # it makes its own, of the padding
    types = [tensor for tensor in TYPES if tensor in arrays]
    known = [Blocks(tensor, per, value) for tensor in types for value in (1, 0) for per in _PER]
    alone = _equal_masks(specs, seen, arrays, None)
    if len(alone) == len(seen):
        return None
    for blocks in known:
        together = _equal_masks(specs, seen, arrays, blocks.of_prompt(arrays)) - alone
        if len(together | alone) == len(seen):
            return replace(blocks, masks=None if len(together) == len(specs) else sorted(together))
    raise _not_served(name, "its attention mask is not understood")


def _equal_masks(
    specs: Sequence[MaskSpec],
    seen: Mapping[str, Array],
    arrays: Mapping[str, Array],
    blocks: Array | None,
) -> set[str]:
    """The names of the masks that the host builds with these blocks as the model does."""
    padding = arrays["attention_mask"]
    equal = set()
    for spec in specs:
        if spec.name in seen and seen[spec.name].shape[1:] == (padding.shape[1],) * 2:
            mask = build_mask(spec, padding, padding.shape[1], np.dtype(np.float32), blocks)
            if ((mask[:, 0] > -1.0) == seen[spec.name])[padding.astype(bool)].all():
                equal.add(spec.name)
    return equal
