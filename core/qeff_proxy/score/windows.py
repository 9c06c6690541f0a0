"""Cut a text file into windows of tokens, without having it in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import UsageError

#: Characters that are tokenized together; a text is cut behind a line, so no longer one is equal
#: token by token to the whole text's.
_BLOCK = 1 << 20


def windows_of(path: Path, tokenizer: Any, length: int) -> Iterator[Array]:
    """Yield the tokens of a text, ``[1, length]`` int64, the last window shorter.

    Where the tokenizer puts tokens for the beginning before a text, every window begins with them.

    Args:
        path: A text in UTF-8.
        tokenizer: The checkpoint's.
        length: Tokens of a window.

    Raises:
        UsageError: The file cannot be read, is no UTF-8, or has no two tokens.
    """
    first = beginning_of(tokenizer)
    new = length - len(first)
    pending: list[int] = []
    count = 0
    for block in blocks_of(path):
        with quiet_loading():  # tokenizers warn of texts that are longer than the model's context
            pending += tokenizer(block, add_special_tokens=False)["input_ids"]
        while len(pending) >= new:
            count += new
            yield np.array([first + pending[:new]], np.int64)
            del pending[:new]
    if len(first) + len(pending) > 1 and pending:
        count += len(pending)
        yield np.array([first + pending], np.int64)
    if not count or len(first) + count < 2:
        raise UsageError(f"{path} has too few tokens to score", "Give it a text of some lines.")


def beginning_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, if any."""
    ids, plain = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    places = range(len(ids) - len(plain) + 1)
    at = next((n for n in places if ids[n : n + len(plain)] == plain), 0)
    first: list[int] = ids[:at]
    return first


def blocks_of(path: Path) -> Iterator[str]:
    """Yield a text in blocks of whole lines.

    Raises:
        UsageError: The file cannot be read, or is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while block := file.read(_BLOCK):
                yield block + file.readline()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Name a text file.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {error}", "Convert it.") from error
