"""Run a capsule on a backend."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.own_process import OwnProcess
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.isolate.blame import distance
from qeff_proxy.isolate.capsule import Capsule, read_capsule
from qeff_proxy.isolate.operators import Values
from qeff_proxy.parts import TensorSpec

#: So much of the recorded error is still the same fault.
_SAME = 0.5


@dataclass(frozen=True)
class Rerun:
    """A capsule on a backend.

    Attributes:
        capsule: Its file.
        backend: The backend that ran it.
        recorded: The error in the capsule, over the peak, of the backend named there.
        error: The error of this one.
        facts: What the capsule says of itself.
    """

    capsule: Path
    backend: str
    recorded: float
    error: float
    facts: Mapping[str, Any]

    @property
    def shows(self) -> bool:
        """Whether the fault shows: at least half of its error."""
        return self.error == math.inf or self.error >= _SAME * self.recorded > 0

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; numbers that are infinite are None."""
        numbers = {"recorded": self.recorded, "error": self.error}
        finite = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
        plain = {"capsule": str(self.capsule), "backend": self.backend, "shows": self.shows}
        return {**plain, **finite, "facts": dict(self.facts)}


def run_capsule(path: Path, backend: str, options: CompileOptions | None = None) -> Rerun:
    """Run a capsule on a backend, and compare with what is expected.

    Raises:
        ArtifactError: The capsule cannot be read.
        BackendError: The backend cannot be used, or refuses the graph.
    """
    capsule = read_capsule(path)
    options = options or CompileOptions()
    load_backend(backend).check_options(backend, options)
    with tempfile.TemporaryDirectory(prefix="qeff-proxy-capsule-") as name:
        folder = Path(name)
        part = _part(capsule, folder)
        export = Export(
            folder, "whole", "capsule", "float32", {"source": str(path)}, (part,), {}, {}, {}, {}
        )
        (folder / "compiled").mkdir()
        process = OwnProcess(backend)
        try:
            with process.open_once(export, part, options, folder / "compiled") as session:
                actual = session.run(capsule.inputs)
        finally:
            process.close()
    error = distance(capsule.expected, actual)
    return Rerun(path, backend, capsule.error, error, capsule.facts)


def _part(capsule: Capsule, folder: Path) -> ExportedPart:
    """Write the graph as an export's part."""
    file = folder / "capsule.onnx"
    onnx.save(capsule.model, file)

    def specs(arrays: Values) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, a.dtype.name, a.shape) for n, a in arrays.items())

    sha256 = sha256_of(file)
    inputs, outputs = specs(capsule.inputs), specs(capsule.expected)
    return ExportedPart("capsule", file.name, None, sha256, inputs, outputs)
