"""Check the arguments of public functions, flows and options.

Each function returns the value if it is valid, and raises `UsageError` otherwise: one line that
names the argument.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError

#: Tokenizers, feature extractors and processors have at least one of these attributes.
_OF_PROCESSORS = (
    "batch_decode",
    "decode",
    "feature_extractor",
    "image_processor",
    "process",
    "sampling_rate",
    "tokenizer",
)


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``; ``True`` and 1.0 are refused."""
    if type(value) is not int or value < least or (most is not None and value > most):
        if most is not None:
            allowed = f"from {least} to {most}"
        else:
            allowed = {0: "from 0 on", 1: "above 0"}.get(least, f"from {least} on")
        raise UsageError(f"{name} is {_shown(value)}", f"It must be a whole number {allowed}.")
    return value


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """A finite number from ``least`` to ``most``."""
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not least <= value <= most or not math.isfinite(value):
        since = "" if least == -math.inf else f" from {least:g}"
        to = "" if most == math.inf else f" to {most:g}"
        raise UsageError(f"{name} is {_shown(value)}", f"It must be a number{since}{to}.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {_shown(value)}", "It must be true or false.")
    return value


def one_of(name: str, value: Any, known: Iterable[Any]) -> Any:
    """One of ``known``, of the same type."""
    for choice in known:
        if type(value) is type(choice) and value == choice:
            return value
    allowed = ", ".join(map(str, known))
    raise UsageError(f"{name} is {_shown(value)}", f"It must be one of {allowed}.")


def path(name: str, value: Any) -> Path | None:
    """A path, its ``~`` expanded; ``None`` stays ``None``."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise UsageError(f"{name} is {_shown(value)}", "Give a path.")
    try:
        return Path(value).expanduser()
    except (RuntimeError, TypeError) as error:  # no such user; a path of bytes
        raise UsageError(f"{name} is {_shown(value)}: {error}", "Give a path.") from error


def texts(name: str, value: Any) -> list[str]:
    """A string or several, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes) or not hasattr(value, "__iter__"):
        raise UsageError(f"{name} is {_shown(value)}", "Give a string, or a list of strings.")
    members = list(value)
    for member in members:
        if not isinstance(member, str):
            raise UsageError(f"{name} has {_shown(member)}, which is no text", "Give strings.")
    return members


def callables(name: str, value: Any) -> Any:
    """A list whose members can be called."""
    if not isinstance(value, list | tuple) or not all(callable(member) for member in value):
        raise UsageError(f"{name} is {_shown(value)}", "Give a list of functions.")
    return value


def processor(name: str, value: Any) -> Any:
    """A tokenizer, feature extractor or processor, by its attributes; ``None`` stays ``None``."""
    if value is None:
        return None
    if isinstance(value, type) or not any(hasattr(value, name) for name in _OF_PROCESSORS):
        what = f"the class {value.__name__}" if isinstance(value, type) else _shown(value)
        raise UsageError(
            f"{name} is {what}, which is no tokenizer or processor",
            "Make one with AutoTokenizer.from_pretrained or AutoProcessor.from_pretrained.",
        )
    return value


def _shown(value: Any) -> str:
    """The value as an error shows it: in one line, shortened to 60 characters."""
    plain = isinstance(value, str | bytes | int | float | list | tuple | dict | None)
    text = " ".join(repr(value).split()) if plain else type_named(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
