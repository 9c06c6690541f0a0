"""A model of representative depth: the first layers of a checkpoint, as a model of their own.

For bringing up a compiler on a large model: the prefix has every kind of layer that the model has,
with the model's own weights, and costs a fraction of it. Its outputs mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from qeff_proxy.common.messages import counted
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.layers.layer_lists import (
    LayerList,
    describe_kinds,
    find_layer_list,
    prefix_with_every_kind,
)
from qeff_proxy.layers.shorten import shorten
from qeff_proxy.load.first_layers import SampledModel
from qeff_proxy.load.load_model import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A number of layers, or ``"auto"``: the shortest prefix that holds every kind of layer twice, or
#: once where the model itself has but one of the kind.
Depth = int | Literal["auto"]
_TWICE = 2


def parse_depth(text: str | int) -> Depth:
    """A number of layers, or ``"auto"``.

    Raises:
        UsageError: It is neither.
    """
    if text == "auto":
        return "auto"
    try:
        number = int(text) if isinstance(text, str) or type(text) is int else 0
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"the number of layers is {text!r}", "Give a number from 1 on, or 'auto'.")
    return number


def with_depth(loaded: LoadedModel, depth: str | int) -> LoadedModel:
    """The model with its first layers only.

    Args:
        loaded: The model; its weights are read when they are needed.
        depth: How many layers, or ``"auto"`` (see `Depth`).

    Returns:
        A model of its own identity, whose ``notes`` say what it stands for once it is read.

    Raises:
        UsageError: ``depth`` is none. Reading the model raises it where there are fewer layers,
            and `UnsupportedModelError` where its layers cannot be found.
    """
    asked = parse_depth(depth)
    notes: dict[str, object] = dict(loaded.notes)

    def count(layers: LayerList) -> int:
        number = prefix_with_every_kind(layers.kinds, _TWICE) if asked == "auto" else asked
        if number > len(layers.layers):
            raise UsageError(
                f"{loaded.source} has {counted(len(layers.layers), 'layer')}, not {number}",
                "Ask for fewer, or for 'auto'.",
            )
        described = describe_kinds(layers)
        notes["stands_for"] = {
            "layers": len(layers.layers),
            "kept": number,
            "kinds": described,
            "left_out": [kind for kind in described if min(kind["layers"]) >= number],
        }
        return number

    def sample(choose: Callable[[LayerList], int]) -> SampledModel:
        assert loaded.sample is not None  # noqa: S101 (set only where it is)
        sampled = loaded.sample(lambda layers: choose(layers.first(count(layers))))
        return sampled.first(count(sampled.layers))

    def read() -> PreTrainedModel:
        from qeff_proxy.load.first_layers import all_layers
        from qeff_proxy.load.transformers_model import NotSampled

        if is_stored:
            try:
                return sample(all_layers).model
            except NotSampled as why:
                raise _no_depth(loaded, str(why)) from why
        layers = find_layer_list(loaded.model)
        short = None
        if layers is not None:
            short = shorten(loaded.model, layers, count(layers))
        if short is None:
            raise _no_depth(loaded, "its layers cannot be found")
        return short

    is_stored = loaded.sample is not None and not loaded.is_read
    identity = hashlib.sha256(f"{loaded.identity}\0layers {asked}".encode()).hexdigest()
    return replace(
        loaded,
        identity=identity,
        read=read,
        sample=sample if is_stored else None,
        notes=notes,
    )


def _no_depth(loaded: LoadedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{loaded.source} cannot be shortened: {why}", "Export it at its full depth."
    )
