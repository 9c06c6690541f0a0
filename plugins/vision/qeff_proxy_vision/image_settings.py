"""How image features enter a language model, said as data; it lies as JSON in the export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qeff_proxy_vision.tiles import TileGrid

__all__ = ["ROWS", "Blocks", "ImageSettings", "Merge"]

#: The input that says which row of features belongs to a position.
ROWS = "image_rows"


@dataclass(frozen=True)
class Merge:
    """What happens to one tensor at the positions that images take.

    Attributes:
        how: ``"replace"`` its rows by features, ``"add"`` features to them, or ``"clear"`` them.
        into: The tensor, ``[batch, query, hidden]``: ``inputs_embeds``, or an input of the body
            that is zero wherever there is no image.
        features: The output of the vision part that holds the features; ``None`` for ``"clear"``.
    """

    how: Literal["replace", "add", "clear"]
    into: str = "inputs_embeds"
    features: str | None = "image_features"


@dataclass(frozen=True)
class Blocks:
    """Image tokens that see each other in both directions.

    Attributes:
        tensor: The processor's output that is 1 at those tokens.
        per: ``"run"``: each run of them is a block; ``"row"``: those of a row are one block.
    """

    tensor: str
    per: Literal["run", "row"]


@dataclass(frozen=True)
class ImageSettings:
    """All that a family says of its images.

    Attributes:
        token_id: The token whose positions images take, in order; ``None`` where ``index`` says.
        merges: What happens at those positions, in order.
        index: The processor's output that says the position of each feature row, -1 for none
            (``[batch, …]``), where there is no image token.
        blocks: Which image tokens see each other.
        grid: How the tiles of an image are arranged, where they are.
        table_rows: Rows of the embedding table; tokens beyond it stand for images only.
        skip_negative: An input of the vision part whose rows of negatives only are left out, and
            that has a row for each row of features.
        rows_per_tile: Rows of features of a tile, where a tile always has as many.
        inputs: The pixels, where the body takes them itself (`qeff_proxy_vision.joined_graph`).
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
        )
