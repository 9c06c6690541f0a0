"""The ``qnn`` backend: Qualcomm's HTP, through ONNX Runtime's QNN provider, on any x86 machine.

Each part becomes a context binary per specialization, which a phone or laptop with that chip can
load. On other machines the provider's emulator runs it with the same bits as HTP. The parts that
hold the vocabulary run on the host in ONNX Runtime: a proxy keeps them off the accelerator.

1. `specialize` fixes the shapes, `split_host` leaves to the host what depends only on positions,
   and `clean_graph` rewrites what the compiler refuses (all called by `prepared`).
2. For ``precision=a16w8`` or ``a8w8``, a `Calibrator` runs the inputs of ``calibration`` once in
   float32, and `quantize_graph` turns the graph into one of whole numbers with ONNX Runtime's
   quantizer.
3. `compile_graph` compiles in a process of its own. A node that stays on the CPU is an error,
   unless ``strict=false``.
4. `QnnSession` runs the binaries, in another process.
"""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import onnxruntime_qnn  # noqa: F401 (so that its absence is an error when the backend is chosen)
from importlib_metadata import version
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.recipe import OPTION, wide_nodes
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, BackendError
from qeff_proxy.graph.modules import weights_of
from qeff_proxy.session.axes import Sizes

from qeff_proxy_npu.fixed_shapes.backend import FixedShapesBackend
from qeff_proxy_npu.fixed_shapes.plan import Plan, name_of
from qeff_proxy_npu.qnn.calibrate import Calibrator, calibration_digest, prepared
from qeff_proxy_npu.qnn.compile import compile_graph
from qeff_proxy_npu.qnn.options import LOWEST_MASK, NAMES, OPTIONS, VALUES, QnnOptions
from qeff_proxy_npu.qnn.quantize import WEIGHTS, quantize_graph
from qeff_proxy_npu.qnn.session import QnnSession

__all__ = ["QnnBackend"]

#: Goes up when what is done to graphs before they are compiled changes.
_PREPARATION = "3"
_EMULATED = "it runs in HTP's emulator here, whose seconds say nothing of a chip's"
_DTYPES = {"float32", "float16", "int64", "int32", "bool"}


class QnnBackend(FixedShapesBackend):
    """Compiles for HTP and runs there, or in its emulator."""

    options = OPTIONS
    values = VALUES
    precisions = NAMES

    def precision(self, options: CompileOptions) -> str:
        """Of the option ``precision``."""
        return QnnOptions.of(options.backend).precision

    def is_calibrated(self, options: CompileOptions) -> bool:
        """In whole numbers."""
        return QnnOptions.of(options.backend).quantized

    def untimed(self, options: CompileOptions) -> str | None:  # noqa: ARG002
        """On a PC, which has no HTP."""
        return _EMULATED if platform.machine().lower() in ("x86_64", "amd64") else None

    def check_options(self, name: str, options: CompileOptions) -> None:
        """Check the chip and the calibration, too."""
        super().check_options(name, options)
        QnnOptions.of(options.backend)

    def fingerprint(self, options: CompileOptions) -> dict[str, str]:
        """A hash of the inputs that are calibrated on."""
        digest = calibration_digest(QnnOptions.of(options.backend))
        return {} if digest is None else {"calibration": digest}

    def write_nodes(self, graph: Path, nodes: Sequence[ir.Node], folder: Path) -> None:
        """Overrides as the converters of Qualcomm's SDK and AIMET write them: float, 16 bits."""
        half = [{"bitwidth": 16, "dtype": "float"}]
        weights = [str(value.name) for node in nodes for value in weights_of(node)]
        results = [str(value.name) for node in nodes for value in node.outputs if value.name]
        encodings = {
            "activation_encodings": dict.fromkeys(results, half),
            "param_encodings": dict.fromkeys(weights, half),
        }
        text = json.dumps(encodings, indent=2) + "\n"
        (folder / f"{graph.stem}.encodings.json").write_text(text, "utf-8")

    def versions(self) -> dict[str, str]:
        """Versions of ONNX Runtime, the provider, and of what is done to graphs before."""
        return {
            "onnxruntime": onnxruntime.__version__,
            "onnxruntime-qnn": version("onnxruntime-qnn"),
            "preparation": _PREPARATION,
        }

    def compile_part(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Write the context binaries of all specializations known beforehand."""
        chosen = QnnOptions.of(options.backend)
        _check_dtypes(part)
        calibrator = _calibrator(export, options, chosen)
        for sizes in Plan.of(part, options).specializations():
            self._compile_one(export, part, sizes, chosen, folder, calibrator)

    def open_part(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> QnnSession:
        """A session on the part's binaries; compiles other sizes when a run brings them."""
        chosen = QnnOptions.of(options.backend)
        _check_dtypes(part)
        calibrator = _calibrator(export, options, chosen)

        def ensure(sizes: Sizes) -> Path:
            path = folder / f"{part.name}.{name_of(sizes)}.json"
            if not path.is_file():
                self._compile_one(export, part, sizes, chosen, folder, calibrator)
            return path

        return QnnSession(part, options, chosen, ensure, _log_path(export, part), self.versions())

    def _compile_one(
        self,
        export: Export,
        part: ExportedPart,
        sizes: Sizes,
        chosen: QnnOptions,
        folder: Path,
        calibrator: Calibrator | None,
    ) -> None:
        """Compile one specialization, aside, and move its files into ``folder``, the JSON last."""
        _check_space(export, part, folder)
        split = prepared(export, part, sizes)
        name = f"{part.name}.{name_of(sizes)}"
        aside = folder / f".{name}.{uuid.uuid4().hex[:8]}"
        aside.mkdir()
        try:
            body, weights, lowest = split.body, export.folder, LOWEST_MASK
            if calibrator is not None:
                ranges = calibrator.ranges_of(export, part)
                masks = [mask.name for mask in part.masks]
                stays = wide_nodes({} if chosen.recipe is None else {OPTION: chosen.recipe})
                body, lowest = quantize_graph(
                    body,
                    weights,
                    ranges,
                    masks,
                    chosen.precision,
                    aside,
                    stays,
                    signed_factors=chosen.signed_factors,
                )
                weights = aside
            log = _log_path(export, part)
            report = compile_graph(body, weights, aside / f"{name}.onnx", chosen, log, part.name)
            (aside / WEIGHTS).unlink(missing_ok=True)
            if split.host is not None:
                ir.save(split.host, aside / f"{name}.host.onnx")
            record = {
                "sizes": sizes,
                "versions": self.versions(),
                "soc": chosen.soc,
                "htp_arch": chosen.htp_arch,
                "precision": chosen.precision,
                **report.to_json(),
                "on_host": list(split.reasons),
                "inputs": [value.name for value in body.graph.inputs],
                "lowest_mask": lowest,
            }
            (aside / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            for path in sorted(aside.iterdir(), key=lambda one: one.suffix == ".json"):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(aside)


def _log_path(export: Export, part: ExportedPart) -> Path:
    """Outside of what is compiled, so that it outlives a compilation that failed."""
    return export.folder / "compiled" / "logs" / f"qnn-{part.name}.log"


def _calibrator(export: Export, options: CompileOptions, chosen: QnnOptions) -> Calibrator | None:
    if calibration_digest(chosen) is None or chosen.calibration is None:
        return None
    if export.dtype != "float32":
        raise BackendError(
            f"precision {chosen.precision} is made of float32, and the export is {export.dtype}",
            "Export in float32.",
        )
    return Calibrator(options, Path(chosen.calibration))


def _check_dtypes(part: ExportedPart) -> None:
    for spec in (*part.inputs, *part.outputs):
        if spec.dtype not in _DTYPES:
            raise BackendError(
                f"HTP does not take {spec.dtype}, which {spec.name} of the {part.name} part has",
                "Export in float32 or float16.",
            )


def _check_space(export: Export, part: ExportedPart, folder: Path) -> None:
    """Refuse to begin where the binary, two bytes a parameter, cannot fit."""
    size = export.files.get(part.weights, 0) if part.weights else 0
    needed = size // 2 if export.dtype == "float32" else size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder.parent} has {free // 2**20} MiB free, and the context binary of the "
            f"{part.name} part needs about {needed // 2**20}",
            "Free space there, or set QEFF_HOME (or --output) to another disk.",
        )
