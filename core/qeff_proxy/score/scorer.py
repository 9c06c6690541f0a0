"""What the scorers of texts, vectors and answers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qeff_proxy.backends.compile_export import Compiled
from qeff_proxy.score.results import Measured
from qeff_proxy.session.session import Session


@dataclass(frozen=True)
class Scorer(ABC):
    """Runs a text on PyTorch and on a backend, and compares what they make of it.

    Attributes:
        text: A file in UTF-8.
        most: Score no more than the first so many windows, lines or files.
        worst: How many of those that differ most to name.
        reference: PyTorch's sessions, one per part.
        progress: Called with the name of each stage as it starts.
    """

    text: Path
    most: int | None
    worst: int
    reference: Mapping[str, Session]
    progress: Callable[[str], None]

    @abstractmethod
    def measure(self, compiled: Compiled, sessions: Mapping[str, Session]) -> Measured:
        """Run all of the text on PyTorch and on a backend.

        Raises:
            UsageError: The text is too short, the model takes no such text, or the backend's
                results have NaN or infinite elements.
        """
