"""What to verify, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.common.arguments import whole_number
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions

if TYPE_CHECKING:
    from qeff_proxy.compare import Tolerances
    from qeff_proxy.parts import Kind

__all__ = ["VerifyOptions"]


@dataclass(frozen=True)
class VerifyOptions:
    """How a model is verified.

    Attributes:
        kind: How a checkpoint is cut: ``"split"`` or ``"whole"``.
        taps: What a checkpoint is exported with (`qeff_proxy.layers.taps`), ``"layers"`` unless
            said. An export has what it has.
        output: The folder of a checkpoint's export, where the default does not serve.
        opset: ONNX opset of a checkpoint's export.
        force: Export and compile again, whatever is there.
        max_new_tokens: Tokens to generate, for models that generate.
        tolerances: How far each tensor may be off; by dtype unless given.
        compile: Shapes and cores, for every backend.
        backends: What only one backend understands, by its name.
        calibration: What backends that quantize are calibrated on (`qeff_proxy.run.calibration`).
        io: Which steps and tensors are dumped and compared.
        io_folder: Where the dumps go; by default a new folder below ``io/`` of the export.
        html: Write a report for each backend: to this file, or with several backends to one beside
            it, with the backend's name before its ending.
        speed: Measure the speed of the backends that pass, and of PyTorch; without layer taps, so
            that a checkpoint is exported without them, too.
        turns: Of that measurement.
    """

    kind: Kind = "split"
    taps: str | Sequence[str] | None = None
    output: Path | None = None
    opset: int | None = None
    force: bool = False
    max_new_tokens: int = 8
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
        """Shapes, cores and the options of one backend."""
        return replace(self.compile, backend=dict(self.backends.get(name, {})))
