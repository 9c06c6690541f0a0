"""Which parts stay on the host, and the plan of the others' fixed shapes (the core's)."""

from __future__ import annotations

from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.fixed_shapes import PADDED, Plan, name_of

__all__ = ["PADDED", "Plan", "name_of", "runs_on_host"]


def runs_on_host(part: ExportedPart) -> bool:
    """Whether a part holds the vocabulary, which a proxy leaves to the host."""
    return part.weights == "vocabulary.safetensors"
