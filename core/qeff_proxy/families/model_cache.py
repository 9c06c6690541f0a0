"""The name of the cache in a model's arguments and outputs.

transformers 5.24 renamed ``past_key_values`` to ``cache``. A checkpoint's own code may keep the
old name with any release, and models without attention have a name of their own, so the name is
read from the model and not from the version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

_OLD_NAME, _NEW_NAME, _STATES_NAME = "past_key_values", "cache", "cache_params"
#: The name in transformers' own outputs and in its generation loop.
LIBRARY_CACHE_NAME: str = (
    _NEW_NAME
    if _NEW_NAME in {field.name for field in fields(CausalLMOutputWithPast)}
    else _OLD_NAME
)


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument of ``forward`` that takes the cache."""
    names = inspect.signature(forward).parameters
    return next((name for name in (_NEW_NAME, _STATES_NAME) if name in names), _OLD_NAME)


def has_cache(outputs: Any) -> bool:
    """Whether a model's ``outputs`` have a cache."""
    return any(hasattr(outputs, name) for name in (_NEW_NAME, _STATES_NAME, _OLD_NAME))


def cache_of(outputs: Any) -> Any:
    """The cache in a model's ``outputs``.

    Raises:
        AttributeError: They have none.
    """
    for name in (_NEW_NAME, _STATES_NAME, _OLD_NAME):
        if hasattr(outputs, name):
            return getattr(outputs, name)
    raise AttributeError(f"{type(outputs).__name__} has no cache: the model keeps it elsewhere")
