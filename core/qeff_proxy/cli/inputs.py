"""What goes into a model, as commands take it: texts, token ids, sounds and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    import argparse

__all__ = ["add_image_option", "parse_rows"]

_LARGEST_ID = 2**63 - 1


def add_image_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--image``."""
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image that the text is about; may be given again",
    )


def parse_rows(texts: list[str]) -> list[list[int]]:
    """Rows of token ids, each written as ``464,3290``.

    Raises:
        UsageError: A text is no list of ids, or the rows differ in length.
    """
    rows = [_parse_ids(text) for text in texts]
    if len({len(row) for row in rows}) > 1:
        raise UsageError("the lists of token ids differ in length", "Run them one by one.")
    return rows


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids:
        raise UsageError(f"{text!r} is no list of token ids", "Such as 464,3290.")
    if not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
        raise UsageError(f"{text!r} has a number that is no token id", "They count from 0.")
    return ids
