"""Options of the ``qnn`` backend: which chip, how precise, how strict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_proxy.common.arguments import one_of
from qeff_proxy.errors import UsageError

__all__ = [
    "ARCHITECTURES",
    "LOWEST_MASK",
    "NAMES",
    "OPTIONS",
    "PRECISIONS",
    "SOCS",
    "VALUES",
    "QnnOptions",
]

#: Chip → its number in the compiler, and the version of its HTP. Only these are accepted: for an
#: unknown number the compiler silently compiles for a default.
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
#: Half precision, or activations and weights of so many bits.
PRECISIONS = ("float16", "a16w8", "a8w8")
#: The same by the names that all backends share.
NAMES: dict[str, dict[str, str]] = {
    "fp16": {},
    **{name: {"precision": name} for name in PRECISIONS[1:]},
}
#: From this HTP on, products of two activations have a second factor of 16 bits; before, of 8.
_SIGNED_FACTORS = 73
#: Attention masks go no lower: float16 ends at -65,504, and scores are added to the mask.
LOWEST_MASK = -30_000.0

OPTIONS: dict[str, str] = {
    "soc": f"the chip: {', '.join(SOCS)} (default: {DEFAULT_SOC})",
    "htp_arch": "version of the HTP, where it is not the chip's own: "
    + ", ".join(map(str, ARCHITECTURES)),
    "precision": f"what is computed in: {', '.join(PRECISIONS)} (default: {PRECISIONS[0]})",
    "calibration": "dump, or folder of dumps, whose inputs a quantized precision is calibrated on "
    "(--calibrate makes one of prompts)",
    "recipe": "the file of a recipe: modules that stay in half precision where the rest is in "
    "whole numbers (--recipe)",
    "strict": "fail where a node would stay on the CPU (default: true)",
    "optimization": "effort of the compiler, 0 to 3 (default: the compiler's own)",
    "vtcm_mb": "fast memory a graph may use, in MB (default: the compiler's own)",
    "timeout": "seconds that compiling a graph, or running it once, may take (default: 3600)",
    "memory_mb": "most address space of compiler and emulator, in MB (default: no limit)",
}
#: See `qeff_proxy.backends.backend.Backend.values`.
VALUES: dict[str, Any] = {
    "precision": PRECISIONS,
    "strict": bool,
    "recipe": str,
    "optimization": (0, 1, 2, 3),
    "vtcm_mb": int,
    "timeout": int,
    "memory_mb": int,
}


@dataclass(frozen=True)
class QnnOptions:
    """The options, checked.

    Attributes:
        soc: The chip's name.
        htp_arch: Version of its HTP.
        precision: Of `PRECISIONS`.
        recipe: The file of a recipe to obey, or ``None``.
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
    recipe: str | None = None
    strict: bool = True
    optimization: int | None = None
    vtcm_mb: int | None = None
    timeout: int = 3600
    memory_mb: int | None = None

    @classmethod
    def of(cls, chosen: Mapping[str, Any]) -> QnnOptions:
        """Read the user's options; `VALUES` checks those that are not checked here.

        Raises:
            UsageError: The chip or its version is unknown, or calibration cannot be right.
        """
        soc = one_of("soc", str(chosen.get("soc", DEFAULT_SOC)).upper(), SOCS)
        architecture = chosen.get("htp_arch", SOCS[soc][1])
        if isinstance(architecture, str):  # as Qualcomm writes it: v73
            architecture = int(text) if (text := architecture.lower().lstrip("v")).isdigit() else 0
        one_of("htp_arch", architecture, ARCHITECTURES)
        others = {name: chosen[name] for name in VALUES if name in chosen}
        calibration = _folder(chosen.get("calibration"), chosen.get("precision", PRECISIONS[0]))
        if "recipe" in chosen and chosen.get("precision", PRECISIONS[0]) == PRECISIONS[0]:
            raise UsageError(
                f"a recipe says what stays in half precision, and all is in {PRECISIONS[0]}",
                f"Say precision={' or precision='.join(PRECISIONS[1:])}, or leave it out.",
            )
        return cls(soc, architecture, calibration=calibration, **others)

    @property
    def quantized(self) -> bool:
        """Whether it computes in whole numbers."""
        return self.precision != PRECISIONS[0]

    @property
    def signed_factors(self) -> bool:
        """Whether the chip multiplies activations of 16 bits by signed ones of 16 bits."""
        return self.htp_arch >= _SIGNED_FACTORS

    def provider(self) -> dict[str, str]:
        """Options of ONNX Runtime's QNN provider."""
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


def _folder(path: Any, precision: str) -> str | None:
    if path is None:
        return None
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        raise UsageError(
            f"calibration is {str(path)!r}, which is no folder", "Give the folder of a dump."
        )
    if precision == PRECISIONS[0]:
        raise UsageError(
            f"precision {precision} needs no calibration",
            f"Say precision={' or precision='.join(PRECISIONS[1:])}, or leave calibration out.",
        )
    return str(Path(path).absolute())
