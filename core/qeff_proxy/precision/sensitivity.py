"""Sensitivity: what each layer and each kind of module loses in a lower precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.graph.modules import unit_of, weights_of
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.precision.distance import Distance
from qeff_proxy.precision.prepare import Prepared, prepare
from qeff_proxy.precision.ranges import LARGEST, Range
from qeff_proxy.request import Request
from qeff_proxy.verify.options import VerifyOptions

#: A unit is worth a word where its peak is so near float16's largest number, or where so large a
#: share of its elements is below the normal ones.
_NEAR, _MANY = 4.0, 0.01


@dataclass(frozen=True)
class Row:
    """A layer, a kind of module, or a unit, in both views.

    Attributes:
        name: Its path, or what the kind is called in each layer.
        share: Of the weights.
        low: It low, and the rest wide.
        wide: It wide, and the rest low.
    """

    name: str
    share: float
    low: Distance
    wide: Distance


@dataclass(frozen=True)
class UnitRange:
    """The numbers of a unit that float16 has no room for, or nearly.

    Attributes:
        name: The unit.
        peak: The largest magnitude of its results.
        weights: That of its weights; 0 where it has none.
        over: The share of elements beyond float16's largest number.
        small: The share that is not 0 and below its normal numbers.
    """

    name: str
    peak: float
    weights: float
    over: float
    small: float

    @property
    def overflows(self) -> bool:
        """Whether some number is beyond float16's largest."""
        return max(self.peak, self.weights) > LARGEST

    def describe(self) -> str:
        """In words."""
        peak = max(self.peak, self.weights)
        whose = "weights" if self.weights == peak else "results"
        if self.overflows:
            return f"overflows in fp16: its {whose} reach {peak:.4g}, of {LARGEST:.5g}"
        if peak > LARGEST / _NEAR:
            return f"is near the end of fp16: its {whose} reach {peak:.4g}, of {LARGEST:.5g}"
        return f"loses in fp16: {self.small:.1%} of its results are below its normal numbers"


@dataclass(frozen=True)
class Sensitivity:
    """What a precision costs, by layer and by kind of module.

    Attributes:
        source: The model.
        backend: Whose precision it is.
        precision: Its name.
        how: What the numbers are of, in words.
        input: The input, as JSON values.
        low: All of it low.
        layers: By layer.
        kinds: By kind of module.
        units: By unit, where that was asked for.
        ranges: The units whose numbers float16 has no room for, or nearly; the worst first.
    """

    source: str
    backend: str
    precision: str
    how: str
    input: Mapping[str, Any]
    low: Distance
    layers: tuple[Row, ...]
    kinds: tuple[Row, ...]
    units: tuple[Row, ...]
    ranges: tuple[UnitRange, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ratio is ``None``."""
        value: dict[str, Any] = plain_json(self)
        return value


def measure_sensitivity(
    model: str | Path | LoadedModel | Export,
    backend: str,
    precision: str,
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    each: bool = False,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Sensitivity:
    """Measure what each layer and kind of module loses in a lower precision.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export with layer taps.
        backend: The backend's name.
        precision: One of its ``precisions``.
        request: The input; by default the flow's example.
        options: Of the export and the backend, as for a verification.
        each: Measure each unit, too.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: The backend lacks the precision, or the input cannot be right.
        UnsupportedModelError: The model cannot be run layer by layer.
    """
    ready = prepare(
        model,
        backend,
        precision,
        request,
        options,
        hooks,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return sensitivity_of(ready, backend, precision, each=each)


def sensitivity_of(
    ready: Prepared, backend: str, precision: str, *, each: bool = False
) -> Sensitivity:
    """`measure_sensitivity` of a model that is ready."""
    variants = ready.variants
    units = list(variants.units.values())
    groups: dict[tuple[str, str], set[str]] = {}
    for unit in units:
        if unit.layer is not None:
            groups.setdefault(("layers", unit.layer), set()).add(unit.name)
        groups.setdefault(("kinds", unit.kind), set()).add(unit.name)
        if each:
            groups.setdefault(("units", unit.name), set()).add(unit.name)
    every = set(variants.units)
    wanted = [every]
    for group in groups.values():
        wanted += [group, every - group]
    ranges = _UnitRanges()
    low, *found = variants.measure(wanted, ranges)
    rows: dict[str, list[Row]] = {"layers": [], "kinds": [], "units": []}
    pairs = zip(found[::2], found[1::2], strict=True)
    for ((what, name), group), (one, other) in zip(groups.items(), pairs, strict=True):
        rows[what].append(Row(name, variants.share(group), one, other))
    return Sensitivity(
        ready.export.model["source"],
        backend,
        precision,
        ready.how,
        ready.described,
        low,
        tuple(rows["layers"]),
        tuple(rows["kinds"]),
        tuple(rows["units"]),
        ranges.found(),
    )


class _UnitRanges:
    """Collects the ranges of units as the layers run."""

    def __init__(self) -> None:
        self._results: dict[str, Range] = {}
        self._weights: dict[str, float] = {}

    def __call__(self, part: ExportedPart, graph: LayerGraph, ranges: Mapping[str, Range]) -> None:  # noqa: ARG002
        for node in graph.model.graph:
            unit = unit_of(node)
            if unit is None:
                continue
            for value in node.outputs:
                one = ranges.get(str(value.name))
                if one is not None:
                    self._results[unit] = one.joined(self._results.get(unit))
            for weight in weights_of(node):
                tensor = weight.const_value
                if tensor is not None and tensor.size:  # without a copy: it may be the vocabulary
                    array = tensor.numpy()
                    peak = max(-float(array.min()), float(array.max()))
                    self._weights[unit] = max(peak, self._weights.get(unit, 0.0))
                    del array
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.release()  # its part of the file stays mapped otherwise

    def found(self) -> tuple[UnitRange, ...]:
        """Those that are worth a word."""
        found = [
            UnitRange(
                name,
                one.peak,
                self._weights.get(name, 0.0),
                one.over / one.count,
                one.small / one.count,
            )
            for name, one in self._results.items()
        ]
        worth = [
            one
            for one in found
            if max(one.peak, one.weights) > LARGEST / _NEAR or one.small > _MANY
        ]
        return tuple(sorted(worth, key=_badness, reverse=True))


def _badness(one: UnitRange) -> tuple[float, float]:
    peak = max(one.peak, one.weights)
    return (peak if peak > LARGEST / _NEAR else 0.0), one.small


def by_loss(rows: Sequence[Row]) -> list[Row]:
    """The rows that lose most alone first."""
    return sorted(rows, key=lambda row: row.low.sqnr)
