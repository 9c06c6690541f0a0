"""Read JSON documents that somebody else may have written: strictly, and field by field.

The dataclasses, structs and typed dicts that hold a document also say what its fields must be::

    @dataclass(frozen=True)
    class Step:
        number: Count
        phase: Literal["prefill", "decode"]

    steps = read_as(list[Step], parse_strictly(data), "'steps'")
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

#: A number of things; below the integers that some readers of JSON round.
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
#: A string that is not empty.
Text = Annotated[str, msgspec.Meta(min_length=1)]
#: The name of a file, and not a path to elsewhere.
FileName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\0]+\Z")]

_T = TypeVar("_T")
_AT = re.compile(r" - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`\Z")


class FieldError(ValueError):
    """A field is not what it should be; names it."""


def read_as(kind: type[_T], value: Any, where: str = "the document") -> _T:
    """An instance of ``kind`` from plain JSON values: every field, of its type, and no other.

    Args:
        kind: A dataclass, a struct, or a collection of these.
        value: From `parse_strictly`.
        where: What names the value in an error.

    Raises:
        FieldError: Names the field that is wrong.
    """
    result = check_fields(kind, value, where)
    _compare_fields(value, result, "", where)
    return result


def check_fields(kind: type[_T], value: Any, where: str) -> _T:
    """Like `read_as`, but ``value`` may have fields that ``kind`` does not have.

    Raises:
        FieldError: Names the field that is wrong.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_path_of)
    except msgspec.ValidationError as error:
        # The message may quote a value of the document, which may hold control characters.
        message = str(error).encode("unicode_escape").decode()
        at = _AT.search(message)
        problem = message[: at.start()] if at else message
        field = _name_of(at["path"] if at else "", where)
        if at and at["key"]:
            field = f"a name in {field}"
        if "matching regex" in problem:  # there is one, of `FileName`
            raise FieldError(f"{field} is not a file name") from error
        raise FieldError(f"{field}: {problem[0].lower()}{problem[1:]}".replace("`", "'")) from error


def _path_of(kind: type, value: Any) -> Any:
    return kind(value) if kind is Path else value


def _name_of(path: str, where: str) -> str:
    """How an error names a field: ``'file' of 'parts'[0] of the document``."""
    names = [re.sub(r"\A[^\[]+", r"'\g<0>'", name) for name in path.split(".") if name]
    return " of ".join([*reversed(names), where])


def _compare_fields(value: Any, result: Any, path: str, where: str) -> None:
    """Refuse fields that were not read, and fields that only have their default."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(value, dict) and isinstance(result, Mapping):
        for names, problem in (
            (result.keys() - value.keys(), "lacks the"),
            (value.keys() - result.keys(), "has an unknown"),
        ):
            if names:
                raise FieldError(f"{_name_of(path, where)} {problem} {min(names)!r}")
        for name, inner in value.items():
            _compare_fields(inner, result[name], f"{path}.{name}", where)
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        for index, (inner, inner_result) in enumerate(zip(value, result, strict=True)):
            _compare_fields(inner, inner_result, f"{path}[{index}]", where)


def plain_json(value: Any) -> Any:
    """``value``, with dataclasses as objects, tuples as lists, and NaN and infinity as ``None``."""
    return msgspec.json.decode(msgspec.json.encode(value))


def parse_strictly(data: bytes) -> Any:
    """The JSON document in ``data``: UTF-8, no key twice, no NaN or Infinity.

    msgspec's own reader accepts repeated keys.

    Raises:
        ValueError: It is not such a document.
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
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value
