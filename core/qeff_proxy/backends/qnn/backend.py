"""The ``qnn`` backend: Qualcomm's HTP, through ONNX Runtime's QNN provider, on any x86 machine.

Each part becomes a context binary per specialization, as a phone or laptop with that chip loads it.
Where there is no such chip, the provider's emulator runs it, bit by bit as HTP computes. The parts
that hold the vocabulary run on the host in ONNX Runtime, since a proxy is made to keep them out.

1. `qeff_proxy.backends.fixed_shapes.specialize` fixes the shapes.
2. `qeff_proxy.backends.fixed_shapes.host_split.split_host` leaves to the host what depends on
   positions alone.
3. `qeff_proxy.backends.fixed_shapes.compiler_fixes.clean_graph` rewrites what the compiler refuses.
4. For ``precision=a16w8`` or ``a8w8``, the inputs of ``calibration`` run once in float32
   (`qnn_calibration`), and ONNX Runtime's quantizer turns the graph into one of whole numbers
   (`qnn_quantize`).
5. A process of its own compiles (`qnn_worker`); what it leaves on the CPU is an error, unless
   ``strict=false``.
"""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxruntime_qnn  # noqa: F401 (its absence is told when the backend is chosen)
from importlib_metadata import version

from qeff_proxy.backends.fixed_shapes import Plan, Sizes, StaticSession, name_of, runs_on_host
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.backends.qnn.calibrate import Calibrator, calibration_digest, prepared
from qeff_proxy.backends.qnn.compile import compile_graph
from qeff_proxy.backends.qnn.options import OPTIONS, QnnOptions
from qeff_proxy.backends.qnn.process import Worker
from qeff_proxy.backends.qnn.quantize import WEIGHTS, quantize_graph
from qeff_proxy.common.file_errors import opening
from qeff_proxy.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact.export_folder import Export, ExportedPart
    from qeff_proxy.backends.fixed_shapes.host_split import HostSplit
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.session.session import Session

__all__ = ["QnnBackend", "QnnSession"]

#: Goes up when what is done to graphs before they are compiled changes.
_PREPARATION = "1"
#: Attention masks go no lower: float16 ends at -65,504, and scores are added to the mask.
_LOWEST_MASK = -30_000.0
_EMULATED = "it runs in HTP's emulator here, whose seconds say nothing of a chip's"
_DTYPES = {"float32", "float16", "int64", "int32", "bool"}


class QnnBackend:
    """Compiles for HTP and runs there, or in its emulator."""

    options: Mapping[str, str] = OPTIONS
    static = True
    #: There is no HTP in a machine of this kind.
    untimed = _EMULATED if platform.machine().lower() in ("x86_64", "amd64") else None

    def precision(self, options: CompileOptions) -> str:
        """What the option ``precision`` says."""
        return QnnOptions.of(options.backend).precision

    def fingerprint(self, options: CompileOptions) -> dict[str, str]:
        """A hash of the inputs that are calibrated on."""
        digest = calibration_digest(QnnOptions.of(options.backend))
        return {} if digest is None else {"calibration": digest}

    def versions(self) -> dict[str, str]:
        """Versions of ONNX Runtime, the provider, and of what is done to graphs before."""
        return {
            "onnxruntime": onnxruntime.__version__,
            "onnxruntime-qnn": version("onnxruntime-qnn"),
            "preparation": _PREPARATION,
        }

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Write the context binaries of all specializations known beforehand."""
        chosen = QnnOptions.of(options.backend)
        if runs_on_host(part):
            OnnxRuntimeBackend().compile(export, part, replace(options, backend={}), folder)
            return
        _check_dtypes(part)
        calibrator = _calibrator(export, options, chosen)
        for sizes in Plan.of(part, options).specializations():
            self._compile_one(export, part, sizes, chosen, folder, calibrator)

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on the part's binaries; a size that was not compiled yet is, when it comes."""
        chosen = QnnOptions.of(options.backend)
        if runs_on_host(part):
            return OnnxRuntimeBackend().open(export, part, replace(options, backend={}), folder)
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
            body, weights, lowest = split.body, export.folder, _LOWEST_MASK
            if calibrator is not None:
                ranges = calibrator.ranges_of(export, part)
                masks = [mask.name for mask in part.masks]
                body, lowest = quantize_graph(body, weights, ranges, masks, chosen.precision, aside)
                weights = aside
            log = _log_path(export, part)
            report = compile_graph(body, weights, aside / f"{name}.onnx", chosen, log, part.name)
            (aside / WEIGHTS).unlink(missing_ok=True)
            _write_host(split, aside / f"{name}.host.onnx")
            found = {
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
            (aside / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
            for path in sorted(aside.iterdir(), key=lambda one: one.suffix == ".json"):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(aside)


class QnnSession:
    """A part on HTP or in its emulator, in a process of its own.

    Args:
        part: What it runs.
        options: Of the compilation.
        chosen: The backend's own.
        ensure: Compiles a specialization where it was not yet; gives its JSON file.
        log: Where the process writes what it has to say.
        versions: What the binaries must have been made with.
    """

    def __init__(
        self,
        part: ExportedPart,
        options: CompileOptions,
        chosen: QnnOptions,
        ensure: Any,
        log: Path,
        versions: Mapping[str, str],
    ) -> None:
        self._part = part
        self._chosen = chosen
        self._ensure = ensure
        self._log = log
        self._versions = dict(versions)
        self._worker: Worker | None = None
        self._session = StaticSession(part, options, self._open, _LOWEST_MASK)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        return self._session.run(feeds)

    def close(self) -> None:
        """End the process."""
        self._session.close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _open(self, sizes: Sizes) -> Session:
        path = self._ensure(sizes)
        found = json.loads(path.read_text("utf-8"))
        if found["versions"] != self._versions:
            raise BackendError(
                f"{path.with_suffix('.onnx')} was made with {_described(found['versions'])}, and "
                f"{_described(self._versions)} is installed",
                "Compile again.",
            )
        if self._worker is None:
            self._worker = Worker(self._log, self._chosen.timeout, self._chosen.memory_mb)
        with opening(path.parent):
            return _Specialization(self._worker, path, self._part, self._chosen, found)


class _Specialization:
    """One context binary, opened in the process, and what the host computes for it."""

    def __init__(
        self,
        worker: Worker,
        path: Path,
        part: ExportedPart,
        chosen: QnnOptions,
        found: Mapping[str, Any],
    ) -> None:
        self._worker = worker
        self._key = path.stem
        self._part = part
        self._inputs: list[str] = found["inputs"]
        self._lowest_mask: float = found["lowest_mask"]
        self._host: onnxruntime.InferenceSession | None = None
        host = path.with_suffix(".host.onnx")
        if host.is_file():
            self._host = onnxruntime.InferenceSession(host, providers=["CPUExecutionProvider"])
        settings = {"session.disable_cpu_ep_fallback": "1"} if chosen.strict else {}
        worker.ask(
            "open",
            key=self._key,
            context=str(path.with_suffix(".onnx")),
            provider=chosen.provider(),
            settings=settings,
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run it once, on arrays of exactly its sizes."""
        known = dict(feeds)
        if self._host is not None:
            taken = {one.name: known[one.name] for one in self._host.get_inputs()}
            names = [one.name for one in self._host.get_outputs()]
            known.update(zip(names, self._host.run(names, taken), strict=True))
        if self._lowest_mask > _LOWEST_MASK:
            for mask in self._part.masks:
                known[mask.name] = np.maximum(known[mask.name], np.float32(self._lowest_mask))
        return self._worker.ask(
            "run",
            {name: known[name] for name in self._inputs},
            key=self._key,
            outputs=[spec.name for spec in self._part.outputs],
        )

    def close(self) -> None:
        """Close it in the process."""
        self._worker.ask("close", key=self._key)


def _write_host(split: HostSplit, path: Path) -> None:
    if split.host is not None:
        ir.save(split.host, path)


def _log_path(export: Export, part: ExportedPart) -> Path:
    """Outside of what is compiled, so that it outlives a compilation that failed."""
    return export.folder / "compiled" / "logs" / f"qnn-{part.name}.log"


def _described(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _calibrator(export: Export, options: CompileOptions, chosen: QnnOptions) -> Calibrator | None:
    if calibration_digest(chosen) is None or chosen.calibration is None:
        return None
    if export.dtype != "float32":
        raise BackendError(
            f"precision {chosen.precision} is made of float32, and the export is {export.dtype}",
            "Export in float32.",
        )
    return Calibrator(options, Path(chosen.calibration), _LOWEST_MASK)


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
