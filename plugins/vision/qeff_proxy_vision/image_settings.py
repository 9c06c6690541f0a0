"""Settings for how image features enter a language model, stored as JSON in the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from qeff_proxy.arrays import Array

from qeff_proxy_vision.geometry import Geometry
from qeff_proxy_vision.positions import Positions
from qeff_proxy_vision.tiles import TileGrid

__all__ = ["Blocks", "ImageSettings", "Merge"]


@dataclass(frozen=True)
class Merge:
    """The change of one tensor at the positions of images.

    Attributes:
        how: ``"replace"`` its rows by features, ``"add"`` features to them, or ``"clear"`` them.
        into: The tensor, ``[batch, query, hidden]``: ``inputs_embeds``, or an input of the body
            that is zero at other positions.
        features: The output of the vision part with the features; ``None`` for ``"clear"``.
    """

    how: Literal["replace", "add", "clear"]
    into: str = "inputs_embeds"
    features: str | None = "image_features"


@dataclass(frozen=True)
class Blocks:
    """Image tokens that attend to each other in both directions.

    Attributes:
        tensor: The processor's output that has ``value`` at those tokens.
        per: ``"run"``: each run of them is a block; ``"row"``: those of a row are one block.
        value: At those tokens.
        masks: Names of the masks by which they do; ``None`` for all.
    """

    tensor: str
    per: Literal["run", "row"]
    value: int = 1
    masks: Sequence[str] | None = None

    def of_prompt(self, tensors: Mapping[str, Array]) -> Array | None:
        """The block of each position, -1 for none: ``[batch, length]`` int64; ``None`` if none."""
        if self.tensor not in tensors:
            return None
        inside = tensors[self.tensor] == self.value
        if not inside.any():
            return None
        if self.per == "row":
            return np.where(inside, 0, -1)
        before = np.concatenate([np.zeros_like(inside[:, :1]), inside[:, :-1]], axis=1)
        return np.where(inside, np.cumsum(inside & ~before, axis=1) - 1, -1)


@dataclass(frozen=True)
class ImageSettings:
    """How a family uses images, or sounds: what is said of images holds of those, too.

    Attributes:
        token_id: The image token, whose positions are filled in order; ``None`` with ``index``.
        merges: The changes at those positions, in order.
        index: Without an image token: the processor's output with the position of each feature
            row, -1 for none (``[batch, …]``).
        blocks: Which image tokens attend to each other.
        grid: How the tiles of an image are arranged, if they are.
        table_rows: Rows of the embedding table; higher token ids are only for images.
        skip_negative: An input of the vision part with one row for each feature row; rows with
            only negative numbers are left out.
        rows_per_tile: Feature rows of a tile, if their number is fixed.
        inputs: The pixels, if the body takes them itself (`qeff_proxy_vision.joined_graph`).
        features: The vision part's outputs that the next part takes, to merge them itself.
        geometry: Of the images, if the vision part is made for one geometry.
        positions: How tokens are numbered, if not by their distance from the first.
        looked_up_as: Token → the token whose embedding the model looks up in its place.
        refused: Processors' outputs that would change the features, and that no part takes.
        what: ``"image"`` or ``"sound"``.
        counted: The tensor that says which feature rows count: an output of the vision part, or the
            processor's; ``None`` where all do.
        apart: The tokens of each sound stand apart from those of others.
        pads: Sounds of fewer frames than a tower takes may be padded with zeros, as their masks.
    """

    token_id: int | None
    merges: tuple[Merge, ...] = (Merge("replace"),)
    index: str | None = None
    blocks: Blocks | None = None
    grid: TileGrid | None = None
    table_rows: int | None = None
    skip_negative: str | None = None
    rows_per_tile: int | None = None
    inputs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    geometry: Geometry | None = None
    positions: Positions | None = None
    looked_up_as: Mapping[int, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    what: Literal["image", "sound"] = "image"
    counted: str | None = None
    pads: bool = False
    apart: bool = False

    @property
    def rows(self) -> str:
        """The input of a part that merges features itself: the feature row of each position."""
        return f"{self.what}_rows"

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        return {
            "token_id": self.token_id,
            "merges": [vars(merge) for merge in self.merges],
            "index": self.index,
            "blocks": vars(self.blocks) if self.blocks else None,
            "grid": self.grid.to_json() if self.grid else None,
            "table_rows": self.table_rows,
            "skip_negative": self.skip_negative,
            "rows_per_tile": self.rows_per_tile,
            "inputs": list(self.inputs),
            "features": list(self.features),
            "geometry": vars(self.geometry) if self.geometry else None,
            "positions": self.positions.to_json() if self.positions else None,
            "looked_up_as": {str(token): other for token, other in self.looked_up_as.items()},
            "refused": list(self.refused),
            "what": self.what,
            "counted": self.counted,
            "pads": self.pads,
            "apart": self.apart,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImageSettings:
        """The settings that `to_json` wrote."""
        return cls(
            value["token_id"],
            tuple(Merge(**merge) for merge in value["merges"]),
            value["index"],
            Blocks(**value["blocks"]) if value["blocks"] else None,
            TileGrid(**value["grid"]) if value["grid"] else None,
            value["table_rows"],
            value["skip_negative"],
            value["rows_per_tile"],
            tuple(value["inputs"]),
            # Older exports have none of these.
            tuple(value.get("features", ())),
            Geometry(**value["geometry"]) if value.get("geometry") else None,
            Positions.from_json(value["positions"]) if value.get("positions") else None,
            {int(token): other for token, other in value.get("looked_up_as", {}).items()},
            tuple(value.get("refused", ())),
            value.get("what", "image"),
            value.get("counted"),
            value.get("pads", False),
            value.get("apart", False),
        )
