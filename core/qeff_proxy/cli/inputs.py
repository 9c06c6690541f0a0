"""Read a model's inputs from the command line: texts, token ids and images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.request import Request

#: Input names of vision models.
_IMAGE_INPUTS = {"pixel_values", "images"}
_LARGEST_ID = 2**63 - 1


def add_media_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--audio`` and ``--image``."""
    parser.add_argument(
        "--audio", action="append", default=[], metavar="FILE", help="a sound; may be given again"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image that the text is about; may be given again",
    )


def add_input_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of `request_of`."""
    inputs = parser.add_argument_group(
        "input", "Without any, an example that fits the model: text, speech, or a drawing."
    )
    inputs.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given again"
    )
    inputs.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="prompts, one a line; blank lines are left out",
    )
    inputs.add_argument(
        "--ids", action="append", default=[], metavar="N,N,…", help="token ids instead of a prompt"
    )
    add_media_options(inputs)
    return inputs


def request_of(args: argparse.Namespace) -> Request | None:
    """The input that the command line names; ``None`` where it names none.

    Raises:
        UsageError: The options do not go together, or a file of prompts cannot be read.
    """
    from qeff_proxy.request import Request

    if args.ids:
        for name in ("prompt", "prompt_file", "audio", "image"):
            if getattr(args, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} and --ids exclude each other")
        rows = parse_rows(args.ids)
        import numpy as np

        return Request(inputs={"input_ids": np.array(rows, np.int64)})
    prompts = [*args.prompt, *read_prompts(args.prompt_file)]
    if not prompts and not args.audio and not args.image:
        return None
    return Request(tuple(prompts), audio=tuple(args.audio), images=tuple(args.image))


def hint_of_image(export: Export, images: Sequence[str]) -> None:
    """Print on stderr how to give an image, where a vision model has none."""
    names = {spec.name for part in export.parts for spec in part.inputs}
    if names & _IMAGE_INPUTS and not images:
        sys.stderr.write(
            "qeff-proxy: note: there is no image, so the model sees the text alone; give one "
            "with --image FILE\n"
        )


def read_prompts(path: Path | None) -> list[str]:
    """The prompts in a file, one a line; none without a file.

    Raises:
        UsageError: The file cannot be read, or has no prompt.
    """
    if path is None:
        return []
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UsageError(f"{path} cannot be read: {reason}", "Name a file of prompts.") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompt", "Write one a line.")
    return prompts


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
