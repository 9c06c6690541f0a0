"""Any image-text model that no other plugin serves, cut by what the model says of itself.

1. `feature_arguments` and `candidates` (`one_image`) make an image of the form that
   ``get_image_features`` takes, and `_vision` the vision part: for any number of tiles where a
   model takes tiles of one size, else for one image of one geometry (``-C image_size=…``).
2. `learn_images` runs the model on a prompt with that image and watches its language model.
3. `add_vision` puts the parts together.

What is not understood is refused before anything is exported, and the verified cut compares the
parts with transformers' own generation.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, TensorSpec
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.audio_text import add_sounds
from qeff_proxy_vision.fixed_image import FEATURES, FixedImagePart, count_operations
from qeff_proxy_vision.geometry import Geometry
from qeff_proxy_vision.grid_image import add_grid
from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.language import (
    HINT,
    cut_language,
    decoder_path_of,
    special_tokens,
    with_inputs,
)
from qeff_proxy_vision.learn_images import TYPES, learn_images, learn_lookups
from qeff_proxy_vision.one_image import (
    OneImage,
    candidates,
    feature_arguments,
    features_owner,
    image_size_option,
    image_token,
    left_out,
)
from qeff_proxy_vision.proxy import Sample, VisionProxy, add_towers
from qeff_proxy_vision.reference import generated_logits
from qeff_proxy_vision.sounds import sound_getter

__all__ = ["build_proxy", "decode", "preprocess"]

#: A module that some models apply to the features themselves.
_PROJECTOR = "multi_modal_projector"


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part from ``get_image_features``; the language model is cut as usual."""
    name = type(model).__name__
    arguments = feature_arguments(model)
    if arguments is None:
        raise UnsupportedModelError(
            f"{name} has no get_image_features: its images do not become embeddings of tokens",
            HINT,
        )
    token_id = image_token(model.config)
    if token_id is None:
        raise UnsupportedModelError(f"the config of {name} names no image token", HINT)
    size = image_size_option(options.get("image_size"))
    text = cut_language(model, embedding, lm_head, kind, options)
    rows = int(text.settings["embedding_rows"])
    decoder_path = decoder_path_of(model, text)
    decoder = model.get_submodule(decoder_path)
    special = sorted(number for number in special_tokens(model) if 0 <= number < rows)
    lookups = learn_lookups(model, decoder, special)
    if size is None:
        text_name = decoder_path.removeprefix("model.").partition(".")[0]
        if (of_tiles := add_grid(model, text, text_name, token_id, lookups)) is not None:
            return of_tiles
    vision = _vision(model, arguments, size, decoder_path, int(text.settings["hidden_size"]))
    make_sample = partial(_sample, model, vision, token_id, rows)
    masks = text.part("body").masks
    learned = learn_images(model, decoder, make_sample(2), vision.features, token_id, masks)
    # That two tiles enter as one does was seen just now, without the cost of running the layers.
    sample: Sample = partial(make_sample, 1 if vision.image.tiled else 2)
    single = text.part("body").inputs[0].shape[1] != "query"
    if single and (learned.blocks is not None or not text.settings["kv_offload"]):
        raise UnsupportedModelError(
            f"{name} has recurrent layers, which are exported to take one position at a time, and "
            "the positions of an image belong together",
            "Leave kv_offload=False out." if learned.blocks is None else HINT,
        )
    geometry = None
    if not vision.image.tiled:
        if not text.settings["kv_offload"]:
            raise UsageError(
                f"{name} takes one image at a time: its tower cannot be in the graph of the body",
                "Leave kv_offload=False out.",
            )
        geometry = _geometry(name, vision, said=size is not None)
    layers = range(1, learned.deepstack + 1)
    merges = [Merge("replace")]
    merges += [Merge("replace", f"layer_features.{n}", f"{FEATURES}.{n}") for n in layers]
    settings = ImageSettings(
        token_id,
        tuple(merges),
        blocks=learned.blocks,
        table_rows=rows if token_id >= rows else None,
        rows_per_tile=vision.rows,
        geometry=geometry,
        positions=learned.positions,
        looked_up_as=lookups,
        refused=tuple(left_out(model)),
    )
    text = with_inputs(text, list(layers), learned.positions.axes if learned.positions else 0)
    towers = [(vision.part(learned.deepstack), settings)]
    get = sound_getter(model)
    if get is not None:
        try:
            tower, sounds, sample = add_sounds(
                model, text, decoder_path, get, options, sample, learned
            )
            towers.append((tower, sounds))
        except UnsupportedModelError as error:
            warnings.warn(f"sounds are left out: {error.problem}", UserWarning, stacklevel=2)
    return add_towers(text, towers, sample, generated_logits)


def _geometry(name: str, vision: _Vision, *, said: bool) -> Geometry:
    """The geometry of the vision part's image; says which it is if the user has not."""
    image = vision.image
    if not said and not image.blanks:
        warnings.warn(
            f"the image tower of {name} is exported for images of {image.size[0]} x "
            f"{image.size[1]} pixels; image_size (-C image_size=HEIGHTxWIDTH) sets another size",
            UserWarning,
            stacklevel=2,
        )
    tensors = {name: value.tolist() for name, value in image.geometry.items()}
    return Geometry(tensors, vision.rows, image.blanks, image.padding, image.along)


@dataclass(frozen=True)
class _Vision:
    """A vision part, and what it makes of an image of noise.

    Attributes:
        module: The part's module.
        image: The image.
        features: The outputs for it, ``[rows, hidden]`` each.
    """

    module: FixedImagePart
    image: OneImage
    features: dict[str, torch.Tensor]

    @property
    def rows(self) -> int:
        """Feature rows of the image."""
        return int(self.features[FEATURES].shape[0])

    def part(self, deepstack: int) -> Part:
        """The part, with as many outputs for layers as are used."""
        pixels, dtype = self.image.pixels, dtype_name(self.image.pixels.dtype)
        first: tuple[int | str, ...] = ("batch",) if self.image.tiled else (pixels.shape[0],)
        count = (*(first if self.image.tiled else ()), self.rows)
        names = list(self.features)[: 1 + deepstack]
        return Part(
            "vision",
            self.module,
            tuple(
                TensorSpec(name, dtype, (*first, *pixels.shape[1:]))
                for name, pixels in self.image.inputs.items()
            ),
            tuple(TensorSpec(n, dtype, (*count, self.features[n].shape[1])) for n in names),
            "vision",
        )


def _vision(
    model: PreTrainedModel,
    arguments: Sequence[str],
    size: tuple[int, int] | None,
    decoder_path: str,
    width: int,
) -> _Vision:
    """The vision part: the first form of an image that the model makes features of."""
    owner = features_owner(model)
    if owner is not model:
        decoder_path = decoder_path.partition(".")[2]
    text_path = decoder_path.partition(".")[0]
    problems, projected = [], []
    projector = getattr(owner, _PROJECTOR, nn.Identity())
    handle = projector.register_forward_hook(lambda *_: projected.append(True))
    for image in candidates(model, arguments, size):
        for path in (None, _PROJECTOR) if hasattr(owner, _PROJECTOR) else (None,):
            module = FixedImagePart(
                owner, text_path, image.geometry, blanks=image.blanks, projector=path
            )
            try:
                features, count = count_operations(module, image.inputs)
                found = features[FEATURES].shape[-1]
                looped = image.tiled and _loops(module, image.inputs, count)
                if found != width or (not projected and hasattr(owner, _PROJECTOR)):
                    problems.append(f"features are {found} wide, not {width}")
                elif looped and "image_sizes" in arguments:
                    problems.append("its tower takes images of any size, and is not told which")
                    break
                else:
                    handle.remove()
                    module.tiled = image.tiled and not looped
                    return _Vision(module, replace(image, tiled=module.tiled), features)
            except Exception as error:  # noqa: BLE001 (a model's code, on a form that may be wrong)
                shape = list(image.pixels.shape)
                problems.append(f"pixels {shape}: {type(error).__name__}: {first_line(error)}")
    handle.remove()
    raise UnsupportedModelError(
        f"the image-text plugin finds no pixels that {type(model).__name__} makes features of "
        f"({problems[0]})",
        "If its config tells no image size, give one: -C image_size=HEIGHTxWIDTH.",
    )


def _loops(module: nn.Module, tile: Mapping[str, torch.Tensor], count: int) -> bool:
    """Whether a tower loops over tiles, so that a trace would freeze their number.

    Args:
        module: The tower.
        tile: Its inputs for one.
        count: Of its operations on that.
    """
    for tiles in (2, 3):  # a single one may be special
        before, many = count, {name: torch.cat([one] * tiles) for name, one in tile.items()}
        if (count := count_operations(module, many)[1]) == before:
            return False
    return True


def _sample(
    model: PreTrainedModel, vision: _Vision, token_id: int, rows: int, images: int
) -> dict[str, torch.Tensor]:
    """Two prompts, the first without an image and padded, the second with the image, or twice."""
    special = special_tokens(model)
    usual = torch.tensor([number for number in range(1, rows) if number not in special])
    places = [3 + place * (vision.rows + 2) for place in range(images)]
    length = places[-1] + vision.rows + 5
    generator = torch.Generator().manual_seed(0)
    ids = usual[torch.randint(len(usual), (2, length), generator=generator)]
    for place in places:
        ids[1, place : place + vision.rows] = token_id
    mask = torch.ones_like(ids)
    mask[0, : length - 8] = 0
    types = (ids == token_id).to(torch.int64)
    tensors = {"input_ids": ids * mask, "attention_mask": mask, **vision.image.batch(images)}
    takes = inspect.signature(model.forward).parameters
    return tensors | {name: types for name in TYPES if name in takes}
