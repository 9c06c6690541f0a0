"""The ``openvino`` backend: Intel's CPUs, GPUs and NPUs.

CPU and GPU run the parts with their dynamic axes. An NPU takes fixed shapes only: there each part
is compiled once per specialization (`qeff_proxy.backends.fixed_shapes`), and the parts that hold
the vocabulary run on the CPU. Nothing is stateful: the cache goes in and comes out, as on every
other backend.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qeff_proxy.arrays import numpy_dtype
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.session.check_feeds import check_feeds

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact.export_folder import Export, ExportedPart
    from qeff_proxy.backends.fixed_shapes import Sizes
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.session.session import Session

__all__ = ["OpenVinoBackend", "OpenVinoSession"]

#: dtype → what OpenVINO calls it.
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_TELEMETRY = "openvino_telemetry"


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which sends a message whenever it is imported.

    OpenVINO does without the package when it is not installed, so it is hidden for the moment.
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


class OpenVinoBackend:
    """Compiles parts with OpenVINO, and runs them on the device that is asked for."""

    options: Mapping[str, str] = {
        "device": "CPU (default), GPU or NPU; GPU.1 where there are several",
        "precision": "what is computed in: float32, float16, bfloat16, or auto: the device's own "
        "choice (default: float32, on an NPU auto)",
        "static_shapes": "compile fixed shapes (default: on an NPU, which knows no others)",
        "save_compiled": "keep the compiled parts, so that opening is quick (default: not on a "
        "CPU, which compiles as fast as it would read them)",
    }

    values: Mapping[str, Any] = {
        "device": str,
        "precision": str,
        "static_shapes": bool,
        "save_compiled": bool,
    }

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and build."""
        return {"openvino": str(openvino.__version__)}

    def devices(self) -> list[str]:
        """The devices that OpenVINO finds here, each with its full name."""
        return [
            f"{device} ({self._core.get_property(device, 'FULL_DEVICE_NAME').strip()})"
            for device in self._core.available_devices
        ]

    def static(self, options: CompileOptions) -> bool:
        """Whether fixed shapes are compiled."""
        default = _device(options).startswith("NPU")
        return bool(options.backend.get("static_shapes", default))

    def precision(self, options: CompileOptions) -> str | None:
        """What is computed in, where that is not float32."""
        device = _device(options)
        asked = _precision(device, options)
        if asked is None:
            asked = self._core.get_property(device, "INFERENCE_PRECISION_HINT").get_type_name()
        names = [name for name, short in _PRECISIONS.items() if short == asked]
        return names[0] if names and names[0] != "float32" else None

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Compile the part, and keep the result where reading it is quicker."""
        device = self._device_of(part, options)
        if not self._fixed(part, options):
            self._save(self._compile(export, part, options, None), device, options, folder, part)
            return
        from qeff_proxy.backends.fixed_shapes import Plan

        for sizes in Plan.of(part, options).specializations():
            compiled = self._compile(export, part, options, sizes)
            self._save(compiled, device, options, folder, part, sizes)

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on what was kept, or on the export, compiled anew."""
        if not self._fixed(part, options):
            return OpenVinoSession(self._reopen(export, part, options, folder, None), part)
        from qeff_proxy.backends.fixed_shapes import StaticSession

        def open_specialization(sizes: Sizes) -> OpenVinoSession:
            compiled = self._reopen(export, part, options, folder, sizes)
            return OpenVinoSession(compiled, part)

        return StaticSession(part, options, open_specialization)

    @cached_property
    def _core(self) -> Any:
        return openvino.Core()

    def _fixed(self, part: ExportedPart, options: CompileOptions) -> bool:
        if not self.static(options):
            return False
        from qeff_proxy.backends.fixed_shapes import runs_on_host

        return not runs_on_host(part)

    def _device_of(self, part: ExportedPart, options: CompileOptions) -> str:
        device = _device(options)
        if device not in {one.partition(".")[0] for one in self._core.available_devices} | set(
            self._core.available_devices
        ):
            raise BackendError(
                f"OpenVINO finds no device {device!r} here, only "
                f"{', '.join(self._core.available_devices)}",
                "Install the device's driver, or choose another with -O device=CPU.",
            )
        on_host = self.static(options) and not self._fixed(part, options)
        return "CPU" if on_host else device

    def _compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, sizes: Sizes | None
    ) -> Any:
        device = self._device_of(part, options)
        path = export.folder / part.file
        properties = _properties(device, options)
        try:
            model = self._core.read_model(path)
            if sizes is not None:
                from qeff_proxy.session.axes import size_of

                model.reshape(
                    {
                        spec.name: [size_of(axis, sizes) for axis in spec.shape]
                        for spec in part.inputs
                    }
                )
            compiled = self._core.compile_model(model, device, properties)
        except (RuntimeError, ValueError) as error:
            from qeff_proxy.backends.openvino.errors import refusal_of

            raise refusal_of(error, path, part.name, device) from error
        _check_precision(compiled, properties, device)
        return compiled

    def _save(
        self,
        compiled: Any,
        device: str,
        options: CompileOptions,
        folder: Path,
        part: ExportedPart,
        sizes: Sizes | None = None,
    ) -> None:
        if options.backend.get("save_compiled", device != "CPU"):
            with _blob(folder, part, sizes).open("wb") as file:
                file.write(compiled.export_model().getbuffer())

    def _reopen(
        self,
        export: Export,
        part: ExportedPart,
        options: CompileOptions,
        folder: Path,
        sizes: Sizes | None,
    ) -> Any:
        path = _blob(folder, part, sizes)
        device = self._device_of(part, options)
        if path.is_file():
            try:
                return self._core.import_model(
                    path.read_bytes(), device, _properties(device, options)
                )
            except RuntimeError:
                # Made by another driver or for another processor: the export is what counts.
                pass
        return self._compile(export, part, options, sizes)


class OpenVinoSession:
    """A part on one of OpenVINO's devices.

    Args:
        compiled: OpenVINO's compiled model.
        part: What it runs.
    """

    def __init__(self, compiled: Any, part: ExportedPart) -> None:
        self._part = part
        self._request: Any = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs one inference at a time

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        name = self._part.name
        with self._lock:
            if self._request is None:
                raise BackendError(f"the session of the {name} part is closed")
            check_feeds(name, self._part.inputs, feeds)
            try:
                result = self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
            except (RuntimeError, ValueError, TypeError) as error:
                self._failed(error)
        outputs: dict[str, Array] = {}
        given: set[int] = set()
        for spec in self._part.outputs:
            array = result[spec.name]
            if id(array) in given:  # one tensor under two names
                array = array.copy()
            given.add(id(array))
            dtype = numpy_dtype(spec.dtype)
            # OpenVINO gives the bits of a bfloat16 as those of a float16.
            outputs[spec.name] = array if array.dtype == dtype else array.view(dtype)
        return outputs

    def close(self) -> None:
        """Release the request, and the weights with it."""
        with self._lock:
            self._request = None

    def _failed(self, error: Exception) -> NoReturn:
        line = [line for line in str(error).splitlines() if line.strip()][-1:]
        raise BackendError(
            f"OpenVINO failed on the {self._part.name} part: {(line or [type(error).__name__])[0]}"
        ) from error


def _device(options: CompileOptions) -> str:
    return str(options.backend.get("device", "CPU")).upper()


def _blob(folder: Path, part: ExportedPart, sizes: Sizes | None) -> Path:
    if sizes is None:
        return folder / f"{part.name}.blob"
    from qeff_proxy.backends.fixed_shapes import name_of

    return folder / f"{part.name}.{name_of(sizes)}.blob"


def _precision(device: str, options: CompileOptions) -> str | None:
    """OpenVINO's name of what is to be computed in; ``None``: the device's own choice."""
    default = "auto" if device.startswith("NPU") else "float32"
    precision = str(options.backend.get("precision", default)).lower()
    if precision not in (*_PRECISIONS, "auto"):
        raise UsageError(
            f"OpenVINO has no precision {precision!r}",
            f"Choose one of {', '.join(_PRECISIONS)} and auto.",
        )
    return _PRECISIONS.get(precision)


def _properties(device: str, options: CompileOptions) -> dict[str, Any]:
    """What OpenVINO is told: https://docs.openvino.ai (properties of the runtime)."""
    precision = _precision(device, options)
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        properties["INFERENCE_PRECISION_HINT"] = precision
    if device == "CPU":
        # Parts and processes share the cores: a thread bound to one would wait for the others.
        properties["ENABLE_CPU_PINNING"] = False
        if precision == "f32":
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if options.num_cores is not None:
            cores = len(os.sched_getaffinity(0))
            properties["INFERENCE_NUM_THREADS"] = min(options.num_cores, cores)
    return properties


def _check_precision(compiled: Any, properties: Mapping[str, Any], device: str) -> None:
    """A device that cannot do what was asked for does something else, and does not say so."""
    asked = properties.get("INFERENCE_PRECISION_HINT")
    if asked is None:
        return
    found = compiled.get_property("INFERENCE_PRECISION_HINT")
    if found != getattr(openvino.Type, asked):
        raise BackendError(
            f"OpenVINO would compute in {found.get_type_name()} on this {device}, not in {asked}",
            "Choose another with -O precision=…, or leave it to the device with auto.",
        )
