"""Images as an overview and a grid of tiles, of any size, whose features a model puts together.

Such a model says the sizes of its grids (``image_grid_pinpoints``) and has a row that ends a line
(``image_newline``) and a method that orders the features of tiles (``pack_image_features``). The
vision part gives the features of tiles and the row, and the host orders them (`TileGrid`), if that
method orders the numbers of rows as the host does for each of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.arrays import to_array
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.parts import Proxy
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qeff_proxy_vision.fixed_image import FEATURES, rows_of
from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.language import with_inputs
from qeff_proxy_vision.one_image import features_owner
from qeff_proxy_vision.proxy import VisionProxy, add_vision, grid_sample
from qeff_proxy_vision.tiles import TileGrid
from qeff_proxy_vision.towers import pixel_part

__all__ = ["add_grid"]

_SPLITS = (torch.split, torch.Tensor.split)  # which are others while a graph is exported


def add_grid(
    model: PreTrainedModel, text: Proxy, text_name: str, token_id: int, lookups: Mapping[int, int]
) -> VisionProxy | None:
    """The proxy of a model with such images; ``None`` for another.

    Args:
        model: The model.
        text: Its cut language model.
        text_name: The child that is the language model.
        token_id: The image token.
        lookups: Token → the token whose embedding the model looks up in its place.

    Raises:
        UnsupportedModelError: Features are for a layer that the language model does not have.
    """
    owner, sizes = features_owner(model), getattr(model.config, "image_grid_pinpoints", None)
    if sizes is None or getattr(owner, "image_newline", None) is None:
        return None
    with_lengths = _gives_lengths(owner, sizes[0])
    if with_lengths is None:
        return None
    vision = model.config.vision_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    module = _TilesPart(owner, text_name, sizes[0], with_lengths=with_lengths)
    with torch.no_grad():
        features = module(torch.zeros(1, *tile, dtype=model.dtype, device=model.device))
    rows, width = next(iter(features.values())).shape
    grid = TileGrid(sizes, vision.image_size, math.isqrt(rows - 1))
    if not _orders_alike(owner, grid):
        return None
    part = pixel_part(module, model.dtype, tile, dict.fromkeys(features, ("rows", width)))
    merges = [Merge("replace")]
    layers = [int(name.removeprefix(f"{FEATURES}.")) for name in features if name != FEATURES]
    if layers:
        text = with_inputs(text, layers, 0)
        merges = [Merge("replace", f"layer_features.{n}", f"{FEATURES}.{n}") for n in layers]
        merges = [Merge("clear", features=None), *merges]
    sample = grid_sample(grid, tile, token_id, int(text.settings["embedding_rows"]))
    settings = ImageSettings(token_id, tuple(merges), grid=grid, looked_up_as=lookups)
    return add_vision(text, part, settings, sample)


class _TilesPart(nn.Module):
    """The model's ``get_image_features``, without its language model, and before it orders tiles.

    Args:
        model: Has ``get_image_features``.
        text_name: The child that is the language model.
        size: One that an image may have.
        with_lengths: The method that orders tiles also gives the number of rows of each image.
    """

    def __init__(
        self, model: PreTrainedModel, text_name: str, size: list[int], *, with_lengths: bool
    ) -> None:
        super().__init__()

        def unordered(features: Any, *_: Any, image_newline: torch.Tensor, **__: Any) -> Any:
            rows = [torch.cat([rows_of(features), image_newline[None]])]
            return (rows, None) if with_lengths else rows

        self.model = replace_modules(model, {text_name: nn.Identity()})
        vars(self.model)["pack_image_features"] = unordered
        self.sizes = [tuple(size)]

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[tiles, channels, height, width]`` to ``image_features [tiles * rows + 1, hidden]``.

        Features for layers are ``image_features.<layer>``, in place of those for the embeddings.
        """
        with _Undivided():
            outputs = self.model.get_image_features(
                pixel_values, image_sizes=self.sizes, return_dict=True
            )
        of_layers = outputs.get("deepstack_features")
        if of_layers is None:
            return {FEATURES: rows_of(outputs["pooler_output"])}
        return {f"{FEATURES}.{layer}": rows_of(features) for layer, features in of_layers}


class _Undivided(TorchFunctionMode):
    """The tiles of all images stay together: the number of an image's tiles would be a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SPLITS and kwargs.get("dim", *args[2:] or (0,)) == 0:
            return (args[0],)
        return func(*args, **kwargs)


def _gives_lengths(model: Any, size: list[int]) -> bool | None:
    """Whether ``pack_image_features`` also gives lengths; ``None`` where it is called otherwise."""
    one = torch.zeros(1, 1, 1)
    try:
        return isinstance(_packed(model, one, size, one.view(1)), tuple)
    except (AttributeError, TypeError):
        return None


def _packed(model: Any, features: torch.Tensor, size: Any, newline: torch.Tensor) -> Any:
    """One image's features as the model orders them."""
    return model.pack_image_features(
        [features],
        torch.tensor([size]),
        vision_feature_select_strategy="full",
        image_newline=newline,
    )


def _orders_alike(model: Any, grid: TileGrid) -> bool:
    """Whether the model orders the numbers of an image's rows as the grid does, at each size."""
    area = grid.side**2
    for height, width in grid.resolutions:
        size = torch.tensor([[height, width - grid.tile // 4]])
        count = math.prod(grid.shape(*size[0].tolist())) + 1
        numbers = torch.arange(count * area + 1.0, dtype=torch.float64)
        packed = _packed(model, numbers[:-1].view(count, area, 1), size[0].tolist(), numbers[-1:])
        found = rows_of(packed[0]).flatten().tolist()
        if found != grid.order(to_array(size)).tolist():
            return False
    return True
