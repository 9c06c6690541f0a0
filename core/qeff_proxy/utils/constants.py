"""QEfficient's ``utils.constants``: the prompt of its examples."""

from __future__ import annotations

from typing import Any

__all__ = ["Constants"]


class Constants:
    """What its examples read of it."""

    INPUT_STR = ("My name is",)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"there is no {__name__}.{name}: export and compile take it as an argument")
