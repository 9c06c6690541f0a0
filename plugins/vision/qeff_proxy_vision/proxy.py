"""Build a vision-language proxy from a cut language model and a vision part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from qeff_proxy.arrays import Array
from qeff_proxy.errors import PluginError, UnsupportedModelError, UsageError
from qeff_proxy.families.generic import build_proxy as build_text_proxy
from qeff_proxy.parts import Kind, Part, Proxy
from qeff_proxy.sites import Absent, Site
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings
from qeff_proxy_vision.joined_graph import join_graphs, join_whole, take_features
from qeff_proxy_vision.reference import model_logits
from qeff_proxy_vision.tiles import TileGrid, sample_tiles

__all__ = [
    "FLOW",
    "Reference",
    "Sample",
    "VisionProxy",
    "add_towers",
    "add_vision",
    "cut_text",
    "grid_sample",
    "marked_text",
    "pixel_sample",
    "sample_prompt",
]

#: The flow that runs these proxies.
FLOW = "image-text-to-text"

#: Creates the tensors of a prompt with an image, like the processor's output.
Sample = Callable[[], Mapping[str, torch.Tensor]]

#: Runs the uncut model: `qeff_proxy_vision.reference.model_logits`, or a family's own.
Reference = Callable[["PreTrainedModel", Mapping[str, "Array"], "Array"], "Array"]


def _no_sample() -> Mapping[str, torch.Tensor]:
    raise PluginError(
        "this proxy cannot be verified: its family has no sample input",
        "The family's build_proxy must provide one.",
    )


@dataclass
class VisionProxy(Proxy):
    """A vision-language model, cut.

    Attributes:
        sample: Creates the tensors of a prompt to verify the cut: ``input_ids`` and
            ``attention_mask [batch, length]`` int64, and the image's tensors.
        reference: Computes the uncut model's logits, with which the parts' are compared.
    """

    sample: Sample = field(default=_no_sample)
    reference: Reference = field(default=model_logits)


def cut_text(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> Proxy:
    """Cut the language model like any other.

    Args:
        model: The uncut model, or the language model in it.
        embedding: Where its token embedding is.
        lm_head: Where its LM head is.
        kind: The kind of the final proxy; the language model is always split here.
        options: ``kv_offload=False`` puts vision and body into one graph.

    Raises:
        UnsupportedModelError: The language model cannot be cut on its own.
    """
    text = build_text_proxy(model, embedding, lm_head, "split")
    if text is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model that can be cut on its own",
            "A plugin for this model type can build its parts in another way.",
        )
    return marked_text(text, kind, options)


def marked_text(text: Proxy, kind: Kind, options: Mapping[str, Any]) -> Proxy:
    """The cut language model, marked with the kind of proxy that `add_vision` builds from it."""
    offload = options.get("kv_offload", True)
    if not isinstance(offload, bool):
        raise UsageError(f"kv_offload is {offload!r}", "It must be True or False.")
    return replace(text, kind=kind, settings={**text.settings, "kv_offload": offload})


def add_vision(
    text: Proxy,
    vision: Part,
    settings: ImageSettings,
    sample: Sample,
    reference: Reference = model_logits,
) -> VisionProxy:
    """Add the vision part before a cut language model, or inside its body.

    Args:
        text: The cut language model, with the kind of the final proxy (`marked_text`).
        vision: The vision part.
        settings: How its features enter the language model.
        sample: Creates a prompt with an image.
        reference: Runs the uncut model, if it is not called like transformers' models.
    """
    return add_towers(text, [(vision, settings)], sample, reference)


def add_towers(
    text: Proxy,
    towers: Sequence[tuple[Part, ImageSettings]],
    sample: Sample,
    reference: Reference,
    flow: str = FLOW,
) -> VisionProxy:
    """Add the parts of images and of sounds. As `add_vision`.

    A part for one image at a time, and one of sounds, stays a part of its own, also of a model that
    is not split.
    """
    before: list[Part] = []
    parts, flow_settings = text.parts, dict(text.settings)
    for tower, settings in towers:
        apart = settings.geometry is not None or settings.what == "sound"
        if text.kind == "split" and (text.settings["kv_offload"] or settings.what == "sound"):
            before.append(tower)
        elif apart:
            (tower, *of_text), settings = take_features((tower, *parts), settings)
            before.append(tower)
            parts = tuple(of_text)
        else:
            parts, settings = join_graphs((tower, *parts), settings)
        flow_settings[settings.what] = settings.to_json()
        rows = flow_settings.get("embedding_rows")
        if rows is not None and settings.token_id is not None:
            # An image token may be beyond the embedding table: it is never looked up.
            flow_settings["embedding_rows"] = max(rows, settings.token_id + 1)
    if text.kind != "split":
        parts = join_whole(parts, stub=text.kind == "stub")
    return VisionProxy(text.kind, flow, (*before, *parts), flow_settings, sample, reference)


def sample_prompt(
    images: Mapping[str, torch.Tensor],
    counts: Sequence[int],
    token_id: int,
    vocabulary: int,
    *,
    types: str | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of random tokens with image tokens among them, padded on the left.

    Args:
        images: The tensors of the images.
        counts: Image tokens of each row.
        token_id: The image token.
        vocabulary: Other tokens are below it.
        types: Name of a tensor to add that is 1 at image tokens and 0 elsewhere.
        seed: Of the tokens.

    Returns:
        ``images``, and ``input_ids`` and ``attention_mask [len(counts), length]`` int64.
    """
    generator = torch.Generator().manual_seed(seed)
    before, after = 3, 5
    length = before + max(counts) + after
    ids = torch.randint(1, vocabulary, (len(counts), length), generator=generator)
    ids[ids == token_id] -= 1
    mask = torch.ones_like(ids)
    for row, count in enumerate(counts):
        start = length - after - count
        ids[row, start : start + count] = token_id
        mask[row, : max(0, start - before - row)] = 0
    tensors = {"input_ids": ids * mask, "attention_mask": mask, **images}
    if types is not None:
        tensors[types] = (ids == token_id).to(torch.int64)
    return tensors


def pixel_sample(
    tile: tuple[int, int, int],
    rows: int,
    token_id: int,
    vocabulary: int,
    *,
    tiles: int = 1,
    types: str | None = None,
) -> Sample:
    """Create a prompt without an image, and one with an image of noise.

    Args:
        tile: Channels, height and width of a tile.
        rows: Feature rows of a tile.
        token_id: The image token.
        vocabulary: Other tokens are below it.
        tiles: Of the image.
        types: As in `sample_prompt`.
    """

    def sample() -> dict[str, torch.Tensor]:
        pixels = torch.randn(tiles, *tile, generator=torch.Generator().manual_seed(0))
        counts = (0, tiles * rows)
        return sample_prompt({"pixel_values": pixels}, counts, token_id, vocabulary, types=types)

    return sample


def grid_sample(
    grid: TileGrid, tile: tuple[int, int, int], token_id: int, vocabulary: int
) -> Sample:
    """The same with an image that is cut into a grid of tiles."""

    def sample() -> dict[str, torch.Tensor]:
        images = sample_tiles(grid, tile)
        count = grid.order(images["image_sizes"].numpy()).size
        return sample_prompt(images, (0, count), token_id, vocabulary)

    return sample
