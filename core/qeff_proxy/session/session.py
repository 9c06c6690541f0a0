"""The base class of sessions, each of which runs one part on one backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from qeff_proxy.arrays import Array
from qeff_proxy.errors import BackendError
from qeff_proxy.session.check_feeds import check_feeds
from qeff_proxy.session.part_like import PartLike

if TYPE_CHECKING:
    from qeff_proxy.parts import TensorSpec


class Session(ABC):
    """One part, ready to run on one backend.

    A subclass implements `compute`, and `release` if it holds something. The checks before a run
    are here, so that every backend refuses the same inputs with the same message.

    Args:
        part: The part that it runs.
    """

    def __init__(self, part: PartLike) -> None:
        self.part = part
        self.name = part.name
        self._closed = False
        #: What was checked last, and the sizes read from it: one value, for threads.
        self._checked: tuple[Any, Mapping[str, int]] = (None, {})

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once.

        Args:
            feeds: One array per input of the part, with the dtype and axes of its spec. An axis
                called ``past`` may be zero long.

        Returns:
            One array per output, by name. The caller owns them.

        Raises:
            BackendError: The session is closed, or the backend refuses the inputs or fails.
        """
        self.check_open()
        outputs = self.compute(feeds, self.check(self.part.inputs, feeds))
        for spec in self.part.outputs:
            if spec.name not in outputs:
                raise BackendError(
                    f"the session of the {self.name} part gave no {spec.name}",
                    "Its backend must return every output of the part.",
                )
        return outputs

    def close(self) -> None:
        """Release what the session holds. Running it afterwards is an error."""
        if not self._closed:
            self._closed = True
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """Run the part once, on inputs that were checked.

        Args:
            feeds: As for `run`.
            sizes: The size of each named axis of the inputs.

        Returns:
            As `run` does, in the order of the part's outputs.

        Raises:
            BackendError: The backend fails.
        """

    def release(self) -> None:  # noqa: B027 (some sessions hold nothing)
        """Release what the session holds; called once, when it is closed."""

    def check_open(self) -> None:
        """Raise a `BackendError` if the session is closed."""
        if self._closed:
            raise BackendError(f"the session of the {self.name} part is closed")

    def check(
        self,
        specs: Iterable[TensorSpec],
        feeds: Mapping[str, Array],
        known: Mapping[str, int] | None = None,
    ) -> Mapping[str, int]:
        """Sizes of the named axes (`check_feeds`); read once while dtypes and shapes repeat."""
        key = known, {name: (array.dtype, array.shape) for name, array in feeds.items()}
        checked, sizes = self._checked
        if key != checked:
            sizes = check_feeds(self.name, specs, feeds, known)
            self._checked = key, sizes
        return sizes
