"""The tensors of one image, in the form that a model's ``get_image_features`` takes them.

The form follows from the names of its arguments, the sizes from the config of the tower. Every
tensor but those of pixels describes the image's geometry (its grid of patches, its size), on which
the number of feature rows depends.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from qeff_proxy.errors import UnsupportedModelError, UsageError
from transformers import PreTrainedModel

__all__ = [
    "PIXELS",
    "OneImage",
    "candidates",
    "feature_arguments",
    "features_owner",
    "image_size_option",
    "image_token",
    "left_out",
]

PIXELS = "pixel_values"
#: Configs' names for the token whose embedding an image's feature replaces.
_TOKENS = (
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "img_context_token_id",
)
#: Side of an image, in pixels, where neither config nor user says it: a multiple of the usual
#: patches (14, 16) and windows (112), with the 256 image tokens that Qwen2-VL makes of it.
_SIDE = 448
#: Arguments of ``get_image_features`` that describe a tower's settings, with defaults of their own.
_SETTINGS = frozenset(
    (
        "args",
        "kwargs",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "batch_num_images",
        "interpolate_pos_encoding",
        "downsample_mode",
        "pixel_mask",
    )
)


@dataclass(frozen=True)
class OneImage:
    """The tensors of one image.

    Attributes:
        pixels: ``pixel_values``, of noise.
        geometry: The other tensors, by name.
        tiled: ``pixel_values`` is ``[tiles, channels, height, width]`` and nothing else is needed.
        blanks: A processor pads the images of a batch with images of zeros.
        padding: The tensor by which a processor marks padding among an image's patches, and its
            value there.
        size: Height and width in pixels.
        along: The axis of ``pixel_values`` along which the images of a batch are lined up.
        more: Further tensors of pixels, by name: of the image in another size.
    """

    pixels: torch.Tensor
    geometry: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tiled: bool = False
    blanks: bool = False
    padding: tuple[str, int] | None = None
    size: tuple[int, int] = (0, 0)
    along: int = 0
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors of pixels, by name."""
        return {PIXELS: self.pixels, **self.more}

    def batch(self, count: int) -> dict[str, torch.Tensor]:
        """The tensors of several images of this geometry, by name; every second is mirrored."""
        tensors = {name: torch.cat([one] * count) for name, one in self.geometry.items()}
        for name, one in self.inputs.items():
            images = [one if index % 2 == 0 else one.flip(-1) for index in range(count)]
            tensors[name] = torch.cat(images, self.along if name == PIXELS else 0)
        return tensors


@dataclass(frozen=True)
class _Sizes:
    channels: int
    height: int
    width: int
    patch: tuple[int, int]
    frames: int  # frames of a patch
    merge: int  # patches along a side that become one image token


def features_owner(model: PreTrainedModel, getter: str = "get_image_features") -> Any:
    """The innermost of model and base model that has a method."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, getter) else model


def feature_arguments(model: PreTrainedModel) -> list[str] | None:
    """What ``get_image_features`` takes, besides settings; ``None`` where a model has none."""
    owner = features_owner(model)
    methods = [getattr(one, "get_image_features", None) for one in (model, owner)]
    if all(method is None for method in methods):
        return None
    return [name for name, needed in _takes(methods).items() if needed or name in _KNOWN]


def left_out(model: PreTrainedModel) -> list[str]:
    """What ``get_image_features`` may be given besides, and is not here."""
    owner = features_owner(model)
    methods = [getattr(one, "get_image_features", None) for one in (model, owner)]
    return [name for name, needed in _takes(methods).items() if not (needed or name in _KNOWN)]


def _takes(methods: Sequence[Any]) -> dict[str, bool]:
    """The arguments of methods, besides settings, and whether they need them."""
    parameters = {
        name: parameter.default is parameter.empty
        for method in methods
        if method is not None
        for name, parameter in inspect.signature(method).parameters.items()
    }
    return {name: needed for name, needed in parameters.items() if name not in _SETTINGS}


def image_token(config: Any) -> int | None:
    """The token that stands for a feature of an image; ``None`` where the config names none."""
    return next((t for name in _TOKENS if (t := getattr(config, name, None)) is not None), None)


def image_size_option(value: Any) -> tuple[int, int] | None:
    """The option ``image_size``: a side, or height and width, in pixels.

    Raises:
        UsageError: It is neither.
    """
    if value is None:
        return None
    try:
        parts = str(value).lower().split("x") if isinstance(value, str) else value
        sides = [parts] if isinstance(parts, int) else list(parts)
        height, width = (sides * 2)[:2] if len(sides) == 1 else sides
        size = int(height), int(width)
    except (TypeError, ValueError):
        size = (0, 0)
    if min(size) < 1:
        raise UsageError(f"image_size is {value!r}", "Give a side in pixels, or HEIGHTxWIDTH.")
    return size


def candidates(
    model: PreTrainedModel, arguments: Sequence[str], size: tuple[int, int] | None
) -> Iterator[OneImage]:
    """Forms that the tensors of one image may have, the most likely first.

    Args:
        model: The model.
        arguments: `feature_arguments` of it.
        size: Height and width of the image in pixels; by default what the config says.

    Raises:
        UnsupportedModelError: ``get_image_features`` takes something that is not known.
    """
    more = {
        name: part.image_size
        for name in arguments
        if name != PIXELS
        and (part := getattr(model.config, name.replace(PIXELS, "vision_config"), None))
    }
    unknown = [name for name in arguments if name not in {*_KNOWN, *more}]
    if unknown:
        raise UnsupportedModelError(
            f"the images of {type(model).__name__} come with {', '.join(unknown)}, which the "
            "image-text plugin does not know",
            "A plugin for this model type can.",
        )
    sizes = _sizes(model.config, size)
    form = next((name for name in _FORMS if name in arguments), PIXELS)
    others = {n: _noise(1, sizes.channels, *_pair(s)).to(model.dtype) for n, s in more.items()}
    for image in _FORMS.get(form, _plain)(sizes, arguments):
        pixels = image.pixels.to(model.dtype)
        yield replace(image, pixels=pixels, size=(sizes.height, sizes.width), more=others)


def _sizes(config: Any, size: tuple[int, int] | None) -> _Sizes:
    names = ("vision_config", "vq_config", *getattr(config, "sub_configs", {}))
    parts = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    vision = next((part for part in parts if hasattr(part, "patch_size")), None)
    vision = vision or next((part for part in parts if hasattr(part, "image_size")), config)

    def read(*names: str, default: Any = None) -> Any:
        values = (getattr(where, name, None) for where in (vision, config) for name in names)
        return next((value for value in values if value is not None), default)

    patch = _pair(read("patch_size", default=1))
    merge = read("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
    merge = merge if isinstance(merge, int) else max(merge or (1,))
    unit = math.lcm(patch[0] * merge, read("window_size", default=1) if merge > 1 else 1)
    default = getattr(vision, "image_size", None) or (math.ceil(_SIDE / unit) * unit)
    if isinstance(default, Mapping):
        default = (default["height"], default["width"])
    height, width = size or _pair(default)
    channels = read("num_channels", "in_channels", "in_chans", default=3)
    return _Sizes(channels, height, width, patch, read("temporal_patch_size", default=1), merge)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _grid(sizes: _Sizes) -> tuple[int, int]:
    """Patches along height and width, as many as can be merged."""
    height, width = sizes.height // sizes.patch[0], sizes.width // sizes.patch[1]
    return height - height % sizes.merge, width - width % sizes.merge


def _packed(sizes: _Sizes, arguments: Sequence[str]) -> Iterator[OneImage]:
    """Patches of all images in a row, and the grid of each (``image_grid_thw``)."""
    height, width = _grid(sizes)
    count, area = height * width, sizes.patch[0] * sizes.patch[1]
    if "image_grid_hw" in arguments:
        geometry = {"image_grid_hw": torch.tensor([[height, width]])}
    else:
        geometry = {"image_grid_thw": torch.tensor([[1, height, width]])}
    if "image_merge_sizes" in arguments:
        geometry["image_merge_sizes"] = torch.tensor([sizes.merge])
    for frames in dict.fromkeys((sizes.frames, 1, 2)):
        yield OneImage(_noise(count, sizes.channels * frames * area), geometry)
    yield OneImage(_noise(count, sizes.channels, *sizes.patch), geometry)
    if "image_grid_thw" in geometry:  # counted in image tokens
        tokens = {
            "image_grid_thw": geometry["image_grid_thw"]
            // torch.tensor([1, sizes.merge, sizes.merge])
        }
        sides = [side * sizes.merge for side in sizes.patch]
        yield OneImage(_noise(count // sizes.merge**2, *sides, sizes.channels), tokens)


def _padded_patches(sizes: _Sizes, arguments: Sequence[str]) -> Iterator[OneImage]:
    """Patches of each image, and the shape of their grid (``spatial_shapes``)."""
    height, width = _grid(sizes)
    pixels = _noise(1, height * width, sizes.channels * sizes.patch[0] * sizes.patch[1])
    shapes = {"spatial_shapes": torch.tensor([[height, width]])}
    mask = "pixel_attention_mask"
    if mask in arguments:
        shapes[mask] = torch.ones(1, height * width, dtype=torch.int64)
    yield OneImage(pixels, shapes, padding=(mask, 0) if mask in arguments else None)


def _placed_patches(sizes: _Sizes, _: Sequence[str]) -> Iterator[OneImage]:
    """Patches of each image, and the place of each patch (``image_position_ids``)."""
    height, width = _grid(sizes)
    pixels = _noise(1, height * width, sizes.channels * sizes.patch[0] * sizes.patch[1])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)[None]
    name = "image_position_ids"
    yield OneImage(pixels.sigmoid(), {name: places}, padding=(name, -1))
    sides = sizes.merge  # such patches are merged before
    corners = places.reshape(1, height, width, 2)[:, ::sides, ::sides].flatten(1, 2) // sides
    merged = pixels.sigmoid().reshape(1, corners.shape[1], -1)
    yield OneImage(merged, {name: corners}, padding=(name, -1))


def _row_of_patches(sizes: _Sizes, _: Sequence[str]) -> Iterator[OneImage]:
    """The patches of all images side by side, and the grid of each (``target_sizes``)."""
    height, width = _grid(sizes)
    pixels = _noise(1, sizes.channels, sizes.patch[0], sizes.patch[1] * height * width)
    yield OneImage(pixels, {"target_sizes": torch.tensor([[height, width]])}, along=3)


def _masked(sizes: _Sizes, _: Sequence[str]) -> Iterator[OneImage]:
    """Images padded to one size and number for each prompt, and masks of what is no padding."""
    mask = torch.ones(1, 1, sizes.height, sizes.width, dtype=torch.int64)
    pixels = _noise(1, 1, sizes.channels, sizes.height, sizes.width)
    yield OneImage(pixels, {"pixel_attention_mask": mask}, blanks=True)
    yield OneImage(pixels, {"pixel_attention_mask": mask[..., 0, 0].bool()}, blanks=True)


def _sized(sizes: _Sizes, _: Sequence[str]) -> Iterator[OneImage]:
    """Images, or their tiles, and the size of each in pixels (``image_sizes``)."""
    pixels = _noise(1, sizes.channels, sizes.height, sizes.width)
    geometry = {"image_sizes": torch.tensor([[sizes.height, sizes.width]])}
    yield OneImage(pixels, geometry)
    for tiles in (2, 5, 3):  # the whole image, and the tiles of an image of one tile, or of four
        yield OneImage(_noise(1, tiles, *pixels.shape[1:]), geometry)
    yield OneImage(pixels, tiled=True)  # by a tower that takes no sizes (LLaVA's)


def _plain(sizes: _Sizes, _: Sequence[str]) -> Iterator[OneImage]:
    """Images or tiles of one size, and nothing else."""
    pixels = _noise(1, sizes.channels, sizes.height, sizes.width)
    yield OneImage(pixels, tiled=True)
    yield OneImage(pixels[None])
    height, width = _grid(sizes)
    yield OneImage(_noise(1, height * width, sizes.channels * sizes.patch[0] * sizes.patch[1]))
    yield OneImage(_noise(1, sizes.frames, *sizes.patch, sizes.channels), tiled=True)


#: The argument that tells the form. The first that a model takes counts.
_FORMS = {
    "image_grid_thw": _packed,
    "image_grid_hw": _packed,
    "spatial_shapes": _padded_patches,
    "image_position_ids": _placed_patches,
    "image_sizes": _sized,
    "target_sizes": _row_of_patches,
    "pixel_attention_mask": _masked,
}
_KNOWN = frozenset((PIXELS, *_FORMS, "image_merge_sizes"))
