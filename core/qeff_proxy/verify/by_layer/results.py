"""The result of a verification by layer, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.compare.compare_dumps import judge
from qeff_proxy.compare.statistics import Scratch, measure, relative_peak, sqnr_db, to_numbers
from qeff_proxy.compare.tolerances import Tolerances


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are from the reference's, in the worst tensor and step of each.

    Attributes:
        passed: Whether all are within their tolerances.
        tensor: The output with the largest error over its peak.
        step: The step in which it has that.
        max_abs: Its largest absolute error.
        over_peak: That error over the reference's largest magnitude.
        sqnr: The least signal-to-quantization-noise ratio in dB; infinite where all are exact.
    """

    passed: bool = True
    tensor: str = ""
    step: str = ""
    max_abs: float = 0.0
    over_peak: float = 0.0
    sqnr: float = math.inf

    def to_json(self) -> dict[str, Any]:
        """The error as a JSON object; numbers that are infinite are None."""
        return {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class LayerResult:
    """One layer on one backend.

    Attributes:
        part: The part it is in.
        layer: Counted from 0; ``None`` for what comes after a part's last layer, and for a part
            without layers.
        local: Its error when fed with the reference's inputs: what it adds.
        inherited: Its error when fed with the backend's own results, of all that ran before.
    """

    part: str
    layer: int | None
    local: LayerError
    inherited: LayerError

    @property
    def name(self) -> str:
        """``body layer 3``, or a part's name for what is in none of its layers."""
        return layer_name(self.part, self.layer)

    @property
    def passed(self) -> bool:
        """Whether both errors are within the tolerances."""
        return self.local.passed and self.inherited.passed

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "part": self.part,
            "layer": self.layer,
            "passed": self.passed,
            "local": self.local.to_json(),
            "inherited": self.inherited.to_json(),
        }


@dataclass(frozen=True)
class BackendLayers:
    """All layers on one backend.

    Attributes:
        backend: Its name.
        layers: Those that ran, in order.
        error: What stopped it before the last; ``None`` where nothing did.
    """

    backend: str
    layers: tuple[LayerResult, ...]
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all layers ran and passed."""
        return self.error is None and all(layer.passed for layer in self.layers)

    @property
    def faulty(self) -> list[LayerResult]:
        """The layers that fail when fed with the reference's inputs."""
        return [layer for layer in self.layers if not layer.local.passed]

    @property
    def worst(self) -> LayerResult:
        """The layer with the largest error of its own."""
        return max(self.layers, key=lambda layer: layer.local.over_peak)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "backend": self.backend,
            "passed": self.passed,
            "error": self.error,
            "faulty": [layer.name for layer in self.faulty],
            "layers": [layer.to_json() for layer in self.layers],
        }


@dataclass(frozen=True)
class LayerVerification:
    """A model on several backends, each layer compared with PyTorch.

    Attributes:
        source: The checkpoint, as the user named it.
        export: The export's folder.
        steps: The steps of the run, as dumps name them.
        results: One per backend.
        interrupted: The layer at which the user stopped the run; ``None`` if it was completed.
    """

    source: str
    export: Path
    steps: tuple[str, ...]
    results: tuple[BackendLayers, ...]
    interrupted: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every backend passed in all layers."""
        complete = self.interrupted is None and bool(self.results)
        return complete and all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """The verification as a JSON object."""
        return {
            "passed": self.passed,
            "model": self.source,
            "export": str(self.export),
            "steps": list(self.steps),
            "interrupted": self.interrupted,
            "backends": [result.to_json() for result in self.results],
        }


def layer_name(part: str, layer: int | None) -> str:
    """``body layer 3``, or a part's name for what is in none of its layers."""
    return part if layer is None else f"{part} layer {layer}"


def compare_layer(
    reference: Mapping[str, Mapping[str, Array]],
    candidate: Mapping[str, Mapping[str, Array]],
    part: str,
    tolerances: Tolerances,
) -> LayerError:
    """Compare a layer's outputs, by step and name, with those of the reference."""
    scratch = Scratch()
    total = LayerError()
    for step, outputs in reference.items():
        for name, expected in outputs.items():
            actual = candidate[step][name]
            dtypes = expected.dtype.name, actual.dtype.name
            tolerance = tolerances.of(f"{part}.out.{name}", *dtypes)
            if expected.shape != actual.shape:
                return LayerError(False, name, step, math.inf, math.inf, -math.inf)
            rows = [
                to_numbers(_stored(array), dtype, True, scratch, slot).reshape(1, -1)
                for array, dtype, slot in zip((expected, actual), dtypes, "rc", strict=True)
            ]
            stats = measure(rows[0], rows[1], tolerance.elementwise, scratch)
            share, sqnr = float(relative_peak(stats)[0]), float(sqnr_db(stats)[0])
            passed = total.passed and bool(judge(stats, tolerance)[0])
            worse = not total.tensor or share > total.over_peak
            total = LayerError(
                passed,
                name if worse else total.tensor,
                step if worse else total.step,
                float(stats["max_abs"][0]) if worse else total.max_abs,
                share if worse else total.over_peak,
                min(sqnr, total.sqnr),
            )
    return total


def _stored(array: Array) -> Array:
    """An array as a dump stores it: dtypes that NumPy lacks as integers."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
