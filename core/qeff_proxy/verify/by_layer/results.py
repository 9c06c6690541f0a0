"""The result of a verification by layer, as plain data."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.common.messages import counted, printable
from qeff_proxy.compare.compare_dumps import judge
from qeff_proxy.compare.statistics import Scratch, measure, relative_peak, sqnr_db, to_numbers
from qeff_proxy.compare.tolerances import NoiseFloor, Tolerance, Tolerances
from qeff_proxy.dump.format import name_tensor
from qeff_proxy.errors import ArtifactError

#: A layer's local error may be so many dB further above its floor than is usual for the layers
#: like it, or so many times their spread: the backend's own rounding is alike in all of them.
#: Healthy layers on HTP in float16 lie within 5 dB of the usual (MiniLM, BERT, GPT-2, a Llama's
#: prefill); in single decode steps the spread is 3 dB, with an outlier of 15. See docs/compare.md.
ALIKE, SPREADS = 6.0, 6.0
#: So many dB above the floor are usual for some layer of a healthy model: 17 for MiniLM's. In
#: others, the rounding of a few huge activations is all the noise, and as low as the floor itself.
USUAL = 18.0
_FEWEST_ALIKE = 4
_SIGMA = 1.4826  # the standard deviation of a normal distribution over its median deviation


@dataclass(frozen=True)
class KindError:
    """The error of one kind of a layer's tensors beside the noise floor.

    Attributes:
        kind: The tensor's name without the layer, and the phase: ``hidden_states in prefill``.
        sqnr: Its signal-to-quantization-noise ratio in dB, in the worst step.
        floor: That of PyTorch in the backend's precision.
        limit: The least that passes.
    """

    kind: str
    sqnr: float
    floor: float
    limit: float


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are from the reference's, in the worst tensor and step of each.

    Attributes:
        passed: Whether all are within their tolerances.
        tensor: The output with the largest error over its peak, of those that fail if any does.
        step: The step in which it has that.
        max_abs: Its largest absolute error.
        over_peak: That error over the reference's largest magnitude.
        sqnr: The least signal-to-quantization-noise ratio in dB; infinite where all are exact.
        kinds: Each kind of tensor beside its noise floor, where that was measured.
        limit: The tolerance of ``tensor``, as users write it.
        remark: Why the error is no number, in words: ``3 NaN of 64 elements``; else empty.
    """

    passed: bool = True
    tensor: str = ""
    step: str = ""
    max_abs: float = 0.0
    over_peak: float = 0.0
    sqnr: float = math.inf
    kinds: tuple[KindError, ...] = ()
    limit: str = ""
    remark: str = ""

    @property
    def nearest(self) -> KindError | None:
        """The kind nearest to its limit, or furthest beyond it."""
        return min(self.kinds, key=lambda kind: kind.sqnr - kind.limit, default=None)

    def to_json(self) -> dict[str, Any]:
        """The error as a JSON object; numbers that are infinite are None."""
        plain: dict[str, Any] = plain_json(self)
        return plain


@dataclass(frozen=True)
class LayerResult:
    """One layer on one backend.

    Attributes:
        part: The part it is in.
        layer: Counted from 0; ``None`` for what comes after a part's last layer, and for a part
            without layers.
        local: Its error when fed with the reference's inputs: what it adds.
        inherited: Its error when fed with the backend's own results, of all that ran before; after
            a layer that failed they begin anew.
        error: Why it did not run; ``None`` where it did.
    """

    part: str
    layer: int | None
    local: LayerError
    inherited: LayerError
    error: str | None = None

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
            "error": self.error,
        }


@dataclass(frozen=True)
class BackendLayers:
    """All layers on one backend.

    Attributes:
        backend: Its name.
        layers: Those that ran or failed, in order.
        error: The first layer that failed, and why; ``None`` where none did.
        note: Why a backend of a lower precision has no noise floor.
        report: The HTML report, where one was asked for.
    """

    backend: str
    layers: tuple[LayerResult, ...]
    error: str | None = None
    note: str | None = None
    report: Path | None = None

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
        """The layer with the least signal over its own error."""
        return min(self.layers, key=lambda layer: layer.local.sqnr)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "backend": self.backend,
            "passed": self.passed,
            "error": self.error,
            "note": self.note,
            "report": str(self.report) if self.report is not None else None,
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
        interrupted: The layer at which the run was stopped; ``None`` if it was completed.
        failure: What stopped it, such as a full disk; ``None`` where the user did.
        resumed: The last layer whose results are those of an interrupted run.
    """

    source: str
    export: Path
    steps: tuple[str, ...]
    results: tuple[BackendLayers, ...]
    interrupted: str | None = None
    failure: ArtifactError | None = None
    resumed: str | None = None

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
            "error": None if self.failure is None else str(self.failure),
            "resumed": self.resumed,
            "backends": [result.to_json() for result in self.results],
        }


def output_names(export: Export) -> list[str]:
    """The names of the outputs of all parts, as dumps and tolerances have them."""
    outputs = ((part.name, spec.name) for part in export.parts for spec in part.outputs)
    return [str(name_tensor(part, "out", name)) for part, name in outputs]


def layer_name(part: str, layer: int | None) -> str:
    """``body layer 3``, or a part's name for what is in none of its layers."""
    return part if layer is None else f"{part} layer {layer}"


def format_decibels(sqnr: float) -> str:
    """``63.2 dB``, or that there is no error."""
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"


def describe_layers(result: BackendLayers, run: LayerVerification) -> list[str]:
    """The verdict of a backend, a paragraph a line."""
    lines = [_summary(result, so_far="so far, " if run.interrupted else "")]
    if result.note is not None:
        lines.append(
            f"Note: the limits are fixed, not relative to a noise floor: {printable(result.note)}"
        )
    if run.interrupted:
        verb = "interrupted" if run.failure is None else "stopped"
        lines.append(
            f"{verb} at {run.interrupted}: what follows did not run; the same command goes on there"
        )
    if run.resumed:
        lines.append(f"up to {run.resumed}: the results of an interrupted run")
    return lines


def _summary(result: BackendLayers, so_far: str) -> str:
    """The verdict in one line."""
    if result.error is not None:
        failed = sum(layer.error is not None for layer in result.layers)
        more = f", and {failed - 1} more failed" if failed > 1 else ""
        return f"{result.backend}: ERROR in {printable(result.error)}{more}"
    if not result.layers:
        return f"{result.backend}: nothing ran"
    total = counted(len(result.layers), "piece")
    if result.faulty:
        names = ", ".join(layer.name for layer in result.faulty)
        return f"{result.backend}: FAILED: out of line by its own error: {names}, of {total}."
    if not result.passed:
        first = next(layer for layer in result.layers if not layer.inherited.passed)
        return (
            f"{result.backend}: FAILED: each of {total} is within tolerance alone; their errors "
            f"add up to more at {first.name}."
        )
    least = result.worst.local.sqnr
    typical = statistics.median(layer.local.sqnr for layer in result.layers)
    return (
        f"{result.backend}: {so_far or 'PASSED: '}all of {total} are within tolerance; largest "
        f"error of its own: {result.worst.name}, {format_decibels(least)} (median "
        f"{format_decibels(typical)})."
    )


def compare_layer(
    reference: Mapping[str, Mapping[str, Array]],
    candidate: Mapping[str, Mapping[str, Array]],
    part: str,
    tolerances: Tolerances,
) -> LayerError:
    """Compare a layer's outputs, by step and name, with those of the reference."""
    scratch = Scratch()
    total = LayerError()
    kinds: dict[str, KindError] = {}
    for step, outputs in reference.items():
        for name, expected in outputs.items():
            actual = candidate[step][name]
            dtypes = expected.dtype.name, actual.dtype.name
            phase, tensor = step.partition("-")[0], str(name_tensor(part, "out", name))
            tolerance = tolerances.of(tensor, *dtypes, phase)
            if expected.shape != actual.shape:
                remark = f"shape {list(actual.shape)} instead of {list(expected.shape)}"
                error = LayerError(False, tensor, step, math.inf, math.inf, -math.inf)
                return replace(error, limit=str(tolerance), remark=remark)
            stats = _measure(expected, actual, tolerance, scratch)
            share, sqnr = float(relative_peak(stats)[0]), float(sqnr_db(stats)[0])
            if stats["unmatched"][0]:  # the ratio is that of the finite elements
                sqnr = -math.inf
            fails = not bool(judge(stats, tolerance)[0])
            worse = not total.tensor or (fails, share) > (not total.passed, total.over_peak)
            passed, least = total.passed and not fails, min(sqnr, total.sqnr)
            if worse:
                total = LayerError(True, tensor, step, float(stats["max_abs"][0]), share)
                total = replace(total, limit=str(tolerance), remark=_unmatched(stats[0]))
            total = replace(total, passed=passed, sqnr=least)
            floor = tolerances.floors.get((phase, tensor))
            named = tolerances.override(tensor) is not None
            if floor is not None and tolerance.sqnr is not None and not named:
                kind = f"{re.sub(r'[.][0-9]+', '', name)} in {phase}"
                if kind not in kinds or sqnr < kinds[kind].sqnr:
                    kinds[kind] = KindError(kind, sqnr, floor.sqnr, tolerance.sqnr)
    return replace(total, kinds=tuple(kinds.values()))


def _unmatched(stats: Any) -> str:
    """The NaN and infinite elements that the reference does not have, in words."""
    if not stats["unmatched"]:
        return ""
    kinds = {"NaN": "nan", "infinite": "inf"}
    counts = {word: (stats[f"candidate_{k}"], stats[f"reference_{k}"]) for word, k in kinds.items()}
    more = [f"{ours} {word}" for word, (ours, theirs) in counts.items() if ours > theirs]
    found = " and ".join(more) or f"{stats['unmatched']} in place of NaN or infinity"
    return f"{found} of {counted(int(stats['count']), 'element')}"


def measure_floor(
    reference: Mapping[str, Mapping[str, Array]],
    rounded: Mapping[str, Mapping[str, Array]],
    part: str,
) -> dict[tuple[str, str], NoiseFloor]:
    """The noise floor of a layer's outputs, by phase and name: the worst of a phase's steps."""
    scratch = Scratch()
    floors: dict[tuple[str, str], NoiseFloor] = {}
    for step, outputs in reference.items():
        for name, expected in outputs.items():
            stats = _measure(expected, rounded[step][name], Tolerance(), scratch)
            key = step.partition("-")[0], str(name_tensor(part, "out", name))
            worst = floors.get(key, NoiseFloor(math.inf, 0.0))
            floors[key] = NoiseFloor(
                min(worst.sqnr, float(sqnr_db(stats)[0])),
                max(worst.peak, float(relative_peak(stats)[0])),
                expected.size,
            )
    return floors


def compare_alike(layers: Sequence[LayerResult]) -> tuple[LayerResult, ...]:
    """Fail the layers whose local error is further above its floor than that of those like them.

    A backend's rounding is the same in all layers of a part, be it near the floor or far from it.
    So a fault of one layer shows that is too small for limits that must suit every backend.
    """
    gaps: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        for kind in layer.local.kinds if layer.layer is not None else ():
            if math.isfinite(kind.floor - kind.sqnr):
                gaps.setdefault((layer.part, kind.kind), []).append(kind.floor - kind.sqnr)
    most: dict[tuple[str, str], float] = {}
    for key, values in gaps.items():
        usual = statistics.median(values)
        spread = statistics.median(abs(value - usual) for value in values)
        if len(values) >= _FEWEST_ALIKE:
            most[key] = max(USUAL, usual + max(ALIKE, SPREADS * _SIGMA * spread))
    judged = []
    for layer in layers:
        kinds = tuple(
            replace(kind, limit=max(kind.limit, round(kind.floor - most[key], 1)))
            if layer.layer is not None and (key := (layer.part, kind.kind)) in most
            else kind
            for kind in layer.local.kinds
        )
        passed = layer.local.passed and all(kind.sqnr >= kind.limit for kind in kinds)
        judged.append(replace(layer, local=replace(layer.local, passed=passed, kinds=kinds)))
    return tuple(judged)


def _measure(expected: Array, actual: Array, tolerance: Tolerance, scratch: Scratch) -> Any:
    """One row of `STATS`."""
    dtypes = expected.dtype.name, actual.dtype.name
    one, two = (
        to_numbers(_stored(array), dtype, True, scratch, slot).reshape(1, -1)
        for array, dtype, slot in zip((expected, actual), dtypes, "rc", strict=True)
    )
    return measure(one, two, tolerance.elementwise, scratch)


def _stored(array: Array) -> Array:
    """An array as a dump stores it: dtypes that NumPy lacks as integers."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
