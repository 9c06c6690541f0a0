"""Options of the ``qnn`` backend: which chip, how precise, how strict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_proxy.errors import UsageError

__all__ = ["ARCHITECTURES", "OPTIONS", "PRECISIONS", "SOCS", "QnnOptions"]

#: Chip → its number in the compiler, and the version of its HTP. The compiler takes other numbers
#: for granted and then compiles for a default, so that only these are accepted.
SOCS: dict[str, tuple[int, int]] = {
    "SM8350": (30, 68),
    "SM8450": (36, 69),
    "SM8550": (43, 73),
    "SM8650": (57, 75),
    "SM8750": (69, 79),
    "SM8850": (87, 81),
    "SC8380XP": (60, 73),
}
DEFAULT_SOC = "SC8380XP"
ARCHITECTURES = tuple(sorted({architecture for _, architecture in SOCS.values()}))
#: What is computed in: half precision, or activations and weights of so many bits.
PRECISIONS = ("float16", "a16w8", "a8w8")

OPTIONS: dict[str, str] = {
    "soc": f"the chip: {', '.join(SOCS)} (default: {DEFAULT_SOC})",
    "htp_arch": "version of the HTP, where it is not the chip's own: "
    + ", ".join(map(str, ARCHITECTURES)),
    "precision": f"what is computed in: {', '.join(PRECISIONS)} (default: {PRECISIONS[0]})",
    "calibration": "dump, or folder of dumps, whose inputs a quantized precision is calibrated on "
    "(--calibrate makes one of prompts)",
    "strict": "fail where a node would stay on the CPU (default: true)",
    "optimization": "effort of the compiler, 0 to 3 (default: the compiler's own)",
    "vtcm_mb": "fast memory a graph may use, in MB (default: the compiler's own)",
    "timeout": "seconds that compiling a graph, or running it once, may take (default: 3600)",
    "memory_mb": "most address space of compiler and emulator, in MB (default: no limit)",
}


@dataclass(frozen=True)
class QnnOptions:
    """The options, checked.

    Attributes:
        soc: The chip's name.
        htp_arch: Version of its HTP.
        precision: Of `PRECISIONS`.
        calibration: The folder of the dumps to calibrate on, or ``None``.
        strict: Whether a node that stays on the CPU is an error.
        optimization: 0 to 3, or ``None``.
        vtcm_mb: In MB, or ``None``.
        timeout: Seconds of a request.
        memory_mb: In MB, or ``None``.
    """

    soc: str = DEFAULT_SOC
    htp_arch: int = SOCS[DEFAULT_SOC][1]
    precision: str = PRECISIONS[0]
    calibration: str | None = None
    strict: bool = True
    optimization: int | None = None
    vtcm_mb: int | None = None
    timeout: int = 3600
    memory_mb: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> QnnOptions:
        """Check what a user gave.

        Raises:
            UsageError: A value is none of those that there are.
        """
        soc = _one_of("soc", str(given.get("soc", DEFAULT_SOC)).upper(), tuple(SOCS))
        architecture = given.get("htp_arch", SOCS[soc][1])
        if isinstance(architecture, str):  # as Qualcomm writes it: v73
            architecture = int(text) if (text := architecture.lower().lstrip("v")).isdigit() else 0
        _one_of("htp_arch", architecture, ARCHITECTURES)
        precision = _one_of("precision", given.get("precision", PRECISIONS[0]), PRECISIONS)
        strict = _one_of("strict", given.get("strict", True), (True, False))
        optimization = given.get("optimization")
        if optimization is not None:
            _one_of("optimization", optimization, (0, 1, 2, 3))
        numbers: dict[str, int | None] = {"vtcm_mb": None, "timeout": 3600, "memory_mb": None}
        for name in numbers:
            if name in given:
                numbers[name] = given[name]
                if type(given[name]) is not int or given[name] < 1:
                    raise UsageError(
                        f"{name} is {given[name]!r}", "It must be a whole number above 0."
                    )
        return cls(
            soc,
            architecture,
            precision,
            _folder(given.get("calibration"), precision),
            strict,
            optimization,
            numbers["vtcm_mb"],
            numbers["timeout"] or 3600,
            numbers["memory_mb"],
        )

    @property
    def quantized(self) -> bool:
        """Whether the precision is one of whole numbers."""
        return self.precision != PRECISIONS[0]

    def provider(self) -> dict[str, str]:
        """What ONNX Runtime's QNN provider is told."""
        import onnxruntime_qnn

        result = {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
            "enable_htp_fp16_precision": "1",
            "soc_model": str(SOCS[self.soc][0]),
            "htp_arch": str(self.htp_arch),
        }
        if self.quantized:
            # Inputs and outputs are float32; by default the CPU turns them into whole numbers.
            result["offload_graph_io_quantization"] = "0"
        if self.optimization is not None:
            result["htp_graph_finalization_optimization_mode"] = str(self.optimization)
        if self.vtcm_mb is not None:
            result["vtcm_mb"] = str(self.vtcm_mb)
        return result


def _folder(given: Any, precision: str) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str | Path) or not Path(given).is_dir():
        raise UsageError(
            f"calibration is {str(given)!r}, which is no folder", "Give the folder of a dump."
        )
    if precision == PRECISIONS[0]:
        raise UsageError(
            f"precision {precision} needs no calibration",
            f"Say precision={' or precision='.join(PRECISIONS[1:])}, or leave calibration out.",
        )
    return str(Path(given).absolute())


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
        shown = ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in known)
        raise UsageError(f"{name} is {value!r}", f"Known are {shown}.")
    return value
