"""The part that a session runs, live or exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qeff_proxy.parts import MaskSpec, TensorSpec


class PartLike(Protocol):
    """What a session needs to know of a part, live (`Part`) or exported (`ExportedPart`)."""

    @property
    def name(self) -> str:
        """The part's name."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Its inputs."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Its outputs."""

    @property
    def masks(self) -> Sequence[MaskSpec]:
        """Which inputs are attention masks."""
