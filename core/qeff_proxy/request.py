"""What a user asks for: the input of the ``preprocess`` hook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """One call's input, before any processor has seen it.

    Attributes:
        prompts: Texts, one per row of the batch; empty where there are none.
        audio: Sound: paths, or arrays of samples.
        images: Paths, URLs, bytes, PIL images or arrays.
        inputs: Tensors or arrays made by the user (``input_ids`` …); they win over the rest.
        options: What else the family's ``preprocess`` understands (``language``, ``task`` …).
    """

    prompts: Sequence[str] = ()
    audio: Sequence[Any] = ()
    images: Sequence[Any] = ()
    inputs: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
