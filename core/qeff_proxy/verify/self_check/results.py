"""The result of a verification without a reference, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qeff_proxy.verify.by_layer.results import LayerError


@dataclass(frozen=True)
class Agreement:
    """How far a backend's results in one arrangement are from those of the input alone.

    Attributes:
        name: The arrangement: ``in a batch``.
        first: The first layer that is beyond its limits; ``None`` where none is.
        worst: The layer of the largest error.
        error: That error; of the first layer, if that is beyond its limits.
        failure: Why the backend did not run the arrangement.
    """

    name: str
    first: str | None = None
    worst: str = ""
    error: LayerError = field(default_factory=LayerError)
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every layer agrees."""
        return self.first is None and self.failure is None

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        error = self.error.to_json()
        return {
            "arrangement": self.name,
            "passed": self.passed,
            "failure": self.failure,
            "first": self.first,
            "worst": self.worst,
            **{name: error[name] for name in ("tensor", "max_abs", "over_peak", "sqnr")},
        }


@dataclass(frozen=True)
class BackendAgreement:
    """One backend in all arrangements.

    Attributes:
        backend: Its name.
        arrangements: Those that ran.
        error: Why it did not even run the input alone.
    """

    backend: str
    arrangements: tuple[Agreement, ...] = ()
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it agrees with itself in all arrangements."""
        return self.error is None and all(one.passed for one in self.arrangements)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "backend": self.backend,
            "passed": self.passed,
            "error": self.error,
            "arrangements": [one.to_json() for one in self.arrangements],
        }


@dataclass(frozen=True)
class SelfVerification:
    """Backends, each compared with itself.

    Attributes:
        source: The model, as the user named it.
        export: The export's folder.
        results: One per backend.
    """

    source: str
    export: Path
    results: tuple[BackendAgreement, ...]

    @property
    def passed(self) -> bool:
        """Whether every backend agrees with itself."""
        return all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """The verification as a JSON object."""
        return {
            "passed": self.passed,
            "model": self.source,
            "export": str(self.export),
            "backends": [result.to_json() for result in self.results],
        }
