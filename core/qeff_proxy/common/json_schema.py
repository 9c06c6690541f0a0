"""Check a JSON document that somebody else may have written: field by field, each of its type.

A check is a function of a value and of the words that name it; it gives the value, or raises
`FieldError` with those words. Checks are put together like the document is::

    step = fields({"number": count, "phase": one_of(("prefill", "decode"))})
    steps = items(step, least=1)
    steps(value["steps"], "'steps'")
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

__all__ = [
    "Check",
    "FieldError",
    "anything",
    "count",
    "entries",
    "fields",
    "file_name",
    "items",
    "matching",
    "number",
    "of_type",
    "one_of",
    "optional",
    "parse_strictly",
    "text",
]

Check = Callable[[Any, str], Any]

_KINDS: dict[type, str] = {str: "a string", int: "an integer", list: "a list", dict: "an object"}
_LARGEST = 2**53  # the integers that every reader of JSON knows exactly


class FieldError(ValueError):
    """A field is not what it should be; names it."""


def anything(value: Any, _where: str) -> Any:
    """Every value."""
    return value


def of_type(kind: type) -> Check:
    """Values of a type: ``str``, ``int`` (no ``bool``), ``list`` or ``dict``."""

    def check(value: Any, where: str) -> Any:
        if type(value) is not kind:
            raise FieldError(f"{where} is not {_KINDS[kind]}")
        return value

    return check


def text(value: Any, where: str) -> str:
    """A string that is not empty."""
    if type(value) is not str or not value:
        raise FieldError(f"{where} is not a string that says something")
    return value


def count(value: Any, where: str) -> int:
    """A number of things, 0 or more."""
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise FieldError(f"{where} is not a count")
    return value


def number(value: Any, where: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise FieldError(f"{where} is not a number")
    return float(value)


def file_name(value: Any, where: str) -> str:
    """The name of a file, and not a path to elsewhere."""
    name = value if type(value) is str else ""
    if PurePosixPath(name).name != name or "\0" in name or name in {"", ".."}:
        raise FieldError(f"{where} is not a file name")
    return name


def one_of(names: Iterable[str]) -> Check:
    """One of some strings."""
    known = tuple(names)

    def check(value: Any, where: str) -> Any:
        if type(value) is not str or value not in known:
            raise FieldError(f"{where} is none of {', '.join(known)}")
        return value

    return check


def matching(pattern: str, what: str) -> Check:
    """A string that a regular expression matches as a whole; ``what`` names such strings."""
    expression = re.compile(pattern)

    def check(value: Any, where: str) -> Any:
        if type(value) is not str or not expression.fullmatch(value):
            raise FieldError(f"{where} is not {what}")
        return value

    return check


def optional(inner: Check) -> Check:
    """``null``, or what the inner check takes."""
    return lambda value, where: None if value is None else inner(value, where)


def items(inner: Check, *, least: int = 0) -> Check:
    """A list of at least so many values."""

    def check(value: Any, where: str) -> Any:
        of_type(list)(value, where)
        if len(value) < least:
            raise FieldError(f"{where} is empty")
        return [inner(one, f"{where}[{index}]") for index, one in enumerate(value)]

    return check


def entries(inner: Check, *, key: Check = text) -> Check:
    """An object from names, of any number, to values."""

    def check(value: Any, where: str) -> Any:
        of_type(dict)(value, where)
        return {
            key(name, f"a name in {where}"): inner(one, f"{name!r} of {where}")
            for name, one in value.items()
        }

    return check


def fields(
    required: Mapping[str, Check],
    may_have: Mapping[str, Check] | None = None,
    *,
    open_: bool = False,
) -> Check:
    """An object with these fields.

    Args:
        required: Those that it has.
        may_have: Those that it may have.
        open_: Whether it may have others, of any type.
    """
    known = {**required, **(may_have or {})}

    def check(value: Any, where: str) -> Any:
        of_type(dict)(value, where)
        lacking = sorted(required.keys() - value.keys())
        unknown = [] if open_ else sorted(value.keys() - known.keys())
        for names, verb in ((lacking, "lacks the"), (unknown, "has an unknown")):
            if names:
                raise FieldError(f"{where} {verb} {names[0]!r}")
        return {
            name: known.get(name, anything)(one, f"{name!r} of {where}")
            for name, one in value.items()
        }

    return check


def parse_strictly(data: bytes) -> Any:
    """The JSON document in ``data``: UTF-8, no key twice, no NaN or Infinity.

    Raises:
        ValueError: It is none.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if b"\\ud" in data or b"\\uD" in data:  # an escaped half of a surrogate pair has no UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value
