"""The options of a verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qeff_proxy.common.arguments import whole_number
from qeff_proxy.compare import Tolerances
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions
from qeff_proxy.parts import Kind

#: Named in place of a backend: all that can be measured on this machine.
BEST = "best"


@dataclass(frozen=True)
class VerifyOptions:
    """How a model is verified.

    Attributes:
        kind: How to cut a checkpoint: ``"split"`` or ``"whole"``.
        taps: Layer outputs to add to a checkpoint's export (`qeff_proxy.layers.taps`); by default
            ``"layers"``. An export keeps its own.
        output: The folder of a checkpoint's export; by default one in the cache.
        opset: ONNX opset of a checkpoint's export.
        weights: How a checkpoint's export holds them (`qeff_proxy.export.export_model`).
        force: Export and compile again, even where both are up to date.
        wait: Wait for another run that writes the same export.
        max_new_tokens: Tokens to generate, for models that generate.
        continuation: By layer and against itself, the tokens that follow the prompt, in place of
            ``max_new_tokens``; by default the prompt again from its start.
        piece: By layer, ``(i, n)`` is the i-th of n equal pieces of the layers. PyTorch computes
            the layers before it; the inherited error begins with it.
        tolerances: How far each tensor may be off; by default according to its dtype.
        compile: Shapes and cores, for every backend.
        backends: Options of one backend, by its name.
        calibration: Inputs to calibrate backends that quantize (`qeff_proxy.run.calibration`).
        io: Which steps and tensors to dump and compare.
        io_folder: Where the dumps go; by default a new folder below ``io/`` of the export.
        html: Write a report for each backend: to this file, or with several backends to files
            beside it, with the backend's name before the suffix.
        speed: Measure the speed of the backends that pass, and of PyTorch. Layer taps cost time,
            so a checkpoint is exported once more without them.
        turns: How often each is measured.
    """

    kind: Kind = "split"
    taps: str | Sequence[str] | None = None
    output: Path | None = None
    opset: int | None = None
    weights: str = "copy"
    force: bool = False
    wait: bool = True
    max_new_tokens: int = 8
    continuation: Sequence[int] = ()
    piece: tuple[int, int] = (1, 1)
    tolerances: Tolerances | None = None
    compile: CompileOptions = field(default_factory=CompileOptions)
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Any = None
    io: DumpOptions = field(default_factory=DumpOptions)
    io_folder: Path | None = None
    html: Path | None = None
    speed: bool = False
    turns: int = 5

    def __post_init__(self) -> None:
        whole_number("turns", self.turns)

    def compile_for(self, name: str) -> CompileOptions:
        """Shapes and cores, with the options of one backend."""
        return replace(self.compile, backend=dict(self.backends.get(name, {})))
