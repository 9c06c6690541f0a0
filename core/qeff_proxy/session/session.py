"""What a backend gives to run: a session per part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.parts import MaskSpec, TensorSpec

__all__ = ["PartLike", "Session"]


class PartLike(Protocol):
    """What running needs to know of a part: live (`Part`) or exported (`ExportedPart`)."""

    @property
    def name(self) -> str:
        """The part's name."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What it takes."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What it gives."""

    @property
    def masks(self) -> Sequence[MaskSpec]:
        """Which inputs are attention masks."""


class Session(Protocol):
    """One part, ready to run on one backend.

    A protocol and no base class, so that a backend from another package needs nothing of this one
    but these two names.
    """

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once.

        Args:
            feeds: One array per input of the part, with the dtype and axes of its spec. An axis
                called ``past`` may be zero long.

        Returns:
            One array per output, by name. The caller owns them.

        Raises:
            BackendError: The backend refuses the inputs, or fails.
        """

    def close(self) -> None:
        """Release what the session holds. Running it afterwards is an error."""
