"""The ``openvino`` backend: Intel's CPUs, GPUs and NPUs.

CPU and GPU run the parts with their dynamic axes. An NPU takes only fixed shapes: each part is
compiled once per specialization (`qeff_proxy_npu.fixed_shapes`), and the parts that hold the
vocabulary run on the CPU. Nothing is stateful: the cache goes in and comes out, as on every other
backend.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend, usable_cores
from qeff_proxy.backends.recipe import OPTION, wide_nodes_of
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.session.axes import Sizes, size_of
from qeff_proxy.session.session import Session

from qeff_proxy_npu.fixed_shapes import Plan, StaticSession, name_of, runs_on_host
from qeff_proxy_npu.fixed_shapes.check_padding import check_padding
from qeff_proxy_npu.openvino.marks import mark
from qeff_proxy_npu.openvino.session import OpenVinoSession

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OpenVinoBackend"]

#: dtype → OpenVINO's name of it.
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_TELEMETRY = "openvino_telemetry"


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which sends a message whenever it is imported.

    OpenVINO works without that package, so it is hidden during the import.
    """
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        import openvino

        return openvino
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # what makes an import fail
    try:
        import openvino
    finally:
        del sys.modules[_TELEMETRY]
    return openvino


openvino = _import_openvino()


class OpenVinoBackend(Backend):
    """Compiles parts with OpenVINO, and runs them on the chosen device."""

    options: Mapping[str, str] = {
        "device": "CPU (default), GPU or NPU; GPU.1 where there are several",
        "precision": "what is computed in: float32, float16, bfloat16, or auto: the device's own "
        "choice (default: float32, on an NPU auto)",
        "recipe": "the file of a recipe: modules that stay in float32 (--recipe)",
        "static_shapes": "compile fixed shapes (default: on an NPU, which knows no others)",
        "save_compiled": "keep the compiled parts, so that opening is quick (default: not on a "
        "CPU, which compiles as fast as it would read them)",
    }
    values: Mapping[str, Any] = {
        "device": str,
        "precision": str,
        "recipe": str,
        "static_shapes": bool,
        "save_compiled": bool,
    }

    precisions: Mapping[str, Mapping[str, Any]] = {
        "fp16": {"precision": "float16"},
        "bf16": {"precision": "bfloat16"},
    }

    def check_options(self, name: str, options: CompileOptions) -> None:
        """Check the precision, too, and refuse a recipe where all is in float32."""
        super().check_options(name, options)
        precision = _precision(_device(options), options)
        if OPTION in options.backend and precision == "f32":
            raise UsageError(
                "a recipe says what stays in float32, and everything does",
                "Say precision=float16 or precision=bfloat16, or leave it out.",
            )

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and build."""
        return {"openvino": str(openvino.__version__)}

    def devices(self) -> list[str]:
        """The devices of this machine, each with its full name."""
        return [
            f"{device} ({self._core.get_property(device, 'FULL_DEVICE_NAME').strip()})"
            for device in self._core.available_devices
        ]

    def needs_fixed_shapes(self, options: CompileOptions) -> bool:
        """By default on an NPU."""
        default = _device(options).startswith("NPU")
        return bool(options.backend.get("static_shapes", default))

    def precision(self, options: CompileOptions) -> str | None:
        """The precision that was asked for or that the device chooses, if not float32.

        Raises:
            BackendError: The device chooses, and this machine does not have it.
        """
        device = _device(options)
        short = _precision(device, options)
        if short is None:
            self._check_device(device)
            short = self._core.get_property(device, "INFERENCE_PRECISION_HINT").get_type_name()
        names = {short: name for name, short in _PRECISIONS.items() if name != "float32"}
        return names.get(short)

    def lowers(self, part: ExportedPart, options: CompileOptions) -> bool:
        """Not those that the host runs."""
        return self._is_fixed(part, options) or not self.needs_fixed_shapes(options)

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Compile the part, and save the result if reading it is quicker than compiling."""
        device = self._device_of(part, options)
        if self._is_fixed(part, options):
            check_padding(export, part)
        for sizes in self._specializations(part, options):
            compiled = self._compile(export, part, options, sizes, folder)
            if options.backend.get("save_compiled", device != "CPU"):
                with _blob(folder, part, sizes).open("wb") as file:
                    file.write(compiled.export_model().getbuffer())

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on what was saved, or on the export, compiled anew."""

        def open_specialization(sizes: Sizes | None) -> OpenVinoSession:
            return OpenVinoSession(self._reopen(export, part, options, folder, sizes), part)

        if not self._is_fixed(part, options):
            return open_specialization(None)
        return StaticSession(part, options, open_specialization)

    def write_nodes(self, graph: Path, nodes: Sequence[ir.Node], folder: Path) -> None:
        """The part in OpenVINO's own format, with the operations marked that stay in float32."""
        mark(openvino, self._core.read_model(graph), nodes, folder / f"{graph.stem}.xml")

    def _source(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Path:
        """What a part is compiled from: the export, or with a recipe its marked copy."""
        graph = export.folder / part.file
        path = folder / f"{graph.stem}.xml"
        if not path.is_file() and OPTION in options.backend and self.lowers(part, options):
            nodes = wide_nodes_of(export, part, options.backend)
            if nodes:
                self.write_nodes(graph, nodes, folder)
        return path if path.is_file() else graph

    @cached_property
    def _core(self) -> Any:
        return openvino.Core()

    def _is_fixed(self, part: ExportedPart, options: CompileOptions) -> bool:
        """Whether a part is compiled to fixed shapes."""
        return self.needs_fixed_shapes(options) and not runs_on_host(part)

    def _specializations(
        self, part: ExportedPart, options: CompileOptions
    ) -> list[Sizes] | list[None]:
        """The fixed shapes of a part; a single ``None`` if its axes stay dynamic."""
        if not self._is_fixed(part, options):
            return [None]
        return Plan.of(part, options).specializations()

    def _device_of(self, part: ExportedPart, options: CompileOptions) -> str:
        """The device that a part is compiled for.

        Raises:
            BackendError: This machine does not have it.
        """
        device = _device(options)
        self._check_device(device)
        on_host = self.needs_fixed_shapes(options) and not self._is_fixed(part, options)
        return "CPU" if on_host else device

    def _check_device(self, device: str) -> None:
        available = self._core.available_devices
        if device not in {*available, *(name.partition(".")[0] for name in available)}:
            raise BackendError(
                f"OpenVINO finds no device {device!r} here, only {', '.join(available)}",
                "Install the device's driver, or choose another with -O device=CPU.",
            )

    def _compile(
        self,
        export: Export,
        part: ExportedPart,
        options: CompileOptions,
        sizes: Sizes | None,
        folder: Path,
    ) -> Any:
        device = self._device_of(part, options)
        path = export.folder / part.file
        properties = _properties(device, options)
        try:
            model = self._core.read_model(self._source(export, part, options, folder))
            if sizes is not None:
                shapes = {s.name: [size_of(axis, sizes) for axis in s.shape] for s in part.inputs}
                model.reshape(shapes)
            compiled = self._core.compile_model(model, device, properties)
        except (RuntimeError, ValueError) as error:
            from qeff_proxy_npu.openvino.errors import refusal_of

            raise refusal_of(error, path, part.name, device) from error
        _check_precision(compiled, properties, device)
        return compiled

    def _reopen(
        self,
        export: Export,
        part: ExportedPart,
        options: CompileOptions,
        folder: Path,
        sizes: Sizes | None,
    ) -> Any:
        path = _blob(folder, part, sizes)
        if path.is_file():
            device = self._device_of(part, options)
            try:
                return self._core.import_model(
                    path.read_bytes(), device, _properties(device, options)
                )
            except RuntimeError:
                # Another driver or processor made it: the export is what counts.
                pass
        return self._compile(export, part, options, sizes, folder)


def _device(options: CompileOptions) -> str:
    return str(options.backend.get("device", "CPU")).upper()


def _blob(folder: Path, part: ExportedPart, sizes: Sizes | None) -> Path:
    if sizes is None:
        return folder / f"{part.name}.blob"
    return folder / f"{part.name}.{name_of(sizes)}.blob"


def _precision(device: str, options: CompileOptions) -> str | None:
    """OpenVINO's name of the precision to compute in; ``None``: the device's own choice."""
    default = "auto" if device.startswith("NPU") else "float32"
    precision = str(options.backend.get("precision", default)).lower()
    if precision not in (*_PRECISIONS, "auto"):
        raise UsageError(
            f"OpenVINO has no precision {precision!r}",
            f"Choose one of {', '.join(_PRECISIONS)} and auto.",
        )
    return _PRECISIONS.get(precision)


def _properties(device: str, options: CompileOptions) -> dict[str, Any]:
    """Properties of the runtime: https://docs.openvino.ai."""
    precision = _precision(device, options)
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        properties["INFERENCE_PRECISION_HINT"] = precision
    if device == "CPU":
        # Parts and processes share the cores: a thread bound to one would wait for the others.
        properties["ENABLE_CPU_PINNING"] = False
        if precision == "f32":
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        cores = usable_cores(options)
        if cores is not None:
            properties["INFERENCE_NUM_THREADS"] = cores
    return properties


def _check_precision(compiled: Any, properties: dict[str, Any], device: str) -> None:
    """Refuse a device that would compute in another precision, which OpenVINO does not report."""
    short = properties.get("INFERENCE_PRECISION_HINT")
    if short is None:
        return
    actual = compiled.get_property("INFERENCE_PRECISION_HINT")
    if actual.get_type_name() != short:
        raise BackendError(
            f"OpenVINO would compute in {actual.get_type_name()} on this {device}, not in {short}",
            "Choose another with -O precision=…, or leave it to the device with auto.",
        )
