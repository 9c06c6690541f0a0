"""Vision and language in one graph: ``kv_offload=False``, and models that are not split.

The body takes the pixels and ``image_rows [batch, query]`` int64, the feature row of each position
(-1 for none), and merges the features itself. In steps without an image the tile axis is empty, so
the tower costs nothing.

`take_features` leaves the vision part a graph of its own, and lets the body merge its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from qeff_proxy.families.decoder import EmbeddingStub, HeadStub
from qeff_proxy.parts import Part, TensorSpec
from torch import nn

from qeff_proxy_vision.image_settings import ImageSettings

__all__ = ["join_graphs", "join_whole", "take_features"]

# Axes of the vision part, renamed so that they differ from the text's in one graph.
_AXES = {"batch": "tiles", "sequence": "image_rows_or_crops"}
_SIZES = {"tiles": 4, "image_rows_or_crops": 6}
_CHECK_SIZES = ({"tiles": 1, "image_rows_or_crops": 3}, {"tiles": 3, "image_rows_or_crops": 5})


class _Joined(nn.Module):
    """The vision part, the merging, and the body."""

    def __init__(self, vision: Part, body: Part, settings: ImageSettings) -> None:
        super().__init__()
        self.vision = vision.module
        self.body = body.module
        self.vision_inputs = [spec.name.replace(".", "__") for spec in vision.inputs]
        self.outputs = vision.outputs
        self.settings = settings

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Like the body, with the vision part's inputs and ``image_rows`` as further inputs."""
        pixels = {name: tensors.pop(name) for name in self.vision_inputs}
        features = self._features(pixels)
        merged = _merged(tensors, features, self.settings)
        outputs: dict[str, torch.Tensor] = self.body(**merged)
        return outputs

    def _features(self, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = next(iter(pixels.values()))
        if torch.compiler.is_compiling() or first.shape[0]:
            features: dict[str, torch.Tensor] = self.vision(**pixels)
            return features
        # PyTorch cannot reshape an empty tensor here; ONNX Runtime can.
        return {spec.name: first.new_zeros(0, int(spec.shape[-1])) for spec in self.outputs}


class _Merging(nn.Module):
    """The merging of features, and the body."""

    def __init__(self, body: nn.Module, features: tuple[str, ...], settings: ImageSettings) -> None:
        super().__init__()
        self.body = body
        self.features = features
        self.settings = settings

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Like the body, with features ``[rows, hidden]`` and ``image_rows`` as further inputs."""
        features = {name: tensors.pop(name.replace(".", "__")) for name in self.features}
        outputs: dict[str, torch.Tensor] = self.body(**_merged(tensors, features, self.settings))
        return outputs


def _merged(
    tensors: dict[str, torch.Tensor],
    features: Mapping[str, torch.Tensor],
    settings: ImageSettings,
) -> dict[str, torch.Tensor]:
    """The body's inputs, with features where ``image_rows`` says."""
    rows = tensors.pop(settings.rows)
    chosen = (rows >= 0)[..., None]
    for merge in settings.merges:
        name = merge.into.replace(".", "__")
        target = tensors.get(name)
        if merge.features is None:
            assert target is not None  # noqa: S101 (only what is there can be cleared)
            tensors[name] = torch.where(chosen, torch.zeros_like(target), target)
            continue
        gathered = _gather(features[merge.features], rows)
        if target is None:
            tensors[name] = gathered
        elif merge.how == "add":
            tensors[name] = target + gathered
        else:
            tensors[name] = torch.where(chosen, gathered, target)
    return tensors


def _gather(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``[batch, query, hidden]``: the feature rows, zeros where ``rows`` is -1."""
    flat = features.reshape(-1, features.shape[-1])
    table = torch.cat([flat, flat.new_zeros(1, flat.shape[-1])])
    return table[torch.where(rows < 0, table.shape[0] - 1, rows)]


class _Whole(nn.Module):
    """Embedding, body and head in a row."""

    def __init__(self, embedding: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.body = body
        self.head = head

    def forward(self, input_ids: torch.Tensor, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """``input_ids [batch, query]`` and the body's other inputs to ``logits`` and the cache."""
        embeddings: Any = self.embedding(input_ids)
        if isinstance(embeddings, Mapping):
            embeddings = embeddings["inputs_embeds"]
        outputs = self.body(inputs_embeds=embeddings, **tensors)
        logits = self.head(outputs.pop("last_hidden_state"))
        return {"logits": logits["logits"] if isinstance(logits, Mapping) else logits, **outputs}


def join_graphs(
    parts: tuple[Part, ...], settings: ImageSettings
) -> tuple[tuple[Part, ...], ImageSettings]:
    """Move the vision part into the body.

    Returns:
        ``embedding``, ``body`` and ``lm_head``, and the changed settings.
    """
    by_name = {part.name: part for part in parts}
    vision, body = by_name["vision"], by_name["body"]
    pixels = tuple(
        replace(spec, shape=tuple(_AXES.get(str(axis), axis) for axis in spec.shape))
        for spec in vision.inputs
    )
    fed = {merge.into for merge in settings.merges if merge.into != "inputs_embeds"}
    rows = TensorSpec(settings.rows, "int64", ("batch", "query"))
    joined = replace(
        body,
        module=_Joined(vision, body, settings),
        inputs=(*(spec for spec in body.inputs if spec.name not in fed), *pixels, rows),
        trace_sizes={**vision.trace_sizes, **body.trace_sizes, **_SIZES},
        check_sizes=_CHECK_SIZES,
    )
    names = tuple(spec.name for spec in pixels)
    return (
        (by_name["embedding"], joined, by_name["lm_head"]),
        replace(settings, inputs=names),
    )


def take_features(
    parts: tuple[Part, ...], settings: ImageSettings
) -> tuple[tuple[Part, ...], ImageSettings]:
    """Let the body take a tower's features, in any number of rows, and merge them.

    Returns:
        The tower, ``embedding``, ``body`` and ``lm_head``, and the changed settings.
    """
    by_name = {part.name: part for part in parts}
    tower, body = parts[0], by_name["body"]
    axis = "feature_rows" if settings.what == "image" else "sound_feature_rows"
    features = tuple(
        replace(spec, shape=(axis, spec.shape[-1]))
        for spec in tower.outputs
        if spec.name != settings.counted
    )
    names = tuple(spec.name for spec in features)
    fed = {merge.into for merge in settings.merges if merge.into != "inputs_embeds"}
    rows = TensorSpec(settings.rows, "int64", ("batch", "query"))
    merging = replace(
        body,
        module=_Merging(body.module, names, settings),
        inputs=(*(spec for spec in body.inputs if spec.name not in fed), *features, rows),
        trace_sizes={**body.trace_sizes, axis: 6 if settings.what == "image" else 8},
        check_sizes=tuple(
            {**sizes, axis: size}
            for size, sizes in zip((3, 5), body.check_sizes or ({}, {}), strict=True)
        ),
    )
    joined = (tower, by_name["embedding"], merging, by_name["lm_head"])
    return joined, replace(settings, features=names)


def join_whole(parts: tuple[Part, ...], *, stub: bool) -> tuple[Part, ...]:
    """Join embedding, body and head into one graph.

    Args:
        parts: The parts from `join_graphs`.
        stub: Replace embedding and head by stubs without weights.

    Returns:
        One part, ``model``.
    """
    embedding, body, head = parts
    before, after = embedding.module, head.module
    logits = head.outputs[0]
    if stub:
        spec = embedding.outputs[0]
        before = EmbeddingStub(int(spec.shape[-1]), getattr(torch, spec.dtype))
        after = HeadStub()
        logits = replace(logits, shape=spec.shape)
    inputs = tuple(spec for spec in body.inputs if spec.name != "inputs_embeds")
    outputs = tuple(spec for spec in body.outputs if spec.name != "last_hidden_state")
    return (
        replace(
            body,
            name="model",
            module=_Whole(before, body.module, after),
            inputs=(*embedding.inputs, *inputs),
            outputs=(logits, *outputs),
            weights="model",
        ),
    )
