"""Plurals and articles for messages."""

from __future__ import annotations

import re

#: Characters that a terminal acts on, and those that have no UTF-8.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

#: Letters whose names begin with a vowel, as those of an abbreviation are read.
_READ_WITH_VOWEL = "AEFHILMNORSX"
#: Beginnings that are written with a vowel and spoken without.
_SPOKEN_WITHOUT = ("uni", "use", "eu", "one")


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: ``1 step``, ``2 steps``; ``many`` is an irregular plural."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def an(word: str) -> str:
    """A word with its article: ``an int``, ``a list``, ``an 'embedding'``, ``an RMSNorm``."""
    said = word.lstrip("'\"`")
    if said[:2].isupper():
        vowel = said[0] in _READ_WITH_VOWEL
    elif said.startswith("nd"):  # as in ndarray
        vowel = True
    else:
        vowel = said[:1].lower() in set("aeiou") and not said.lower().startswith(_SPOKEN_WITHOUT)
    return f"{'an' if vowel else 'a'} {word}"


def type_named(value: object) -> str:
    """The type of a value, with its article: ``an int``."""
    return an(type(value).__name__)


def escape_controls(text: str) -> str:
    """``text`` with its control characters, but for newline and tab, as the escapes of JSON."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: object) -> str:
    """Return ``text`` with what is not printable escaped: words of files are not to be trusted."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
