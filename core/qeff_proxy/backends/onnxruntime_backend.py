"""The ``onnxruntime`` backend: any machine's CPU, dynamic shapes. The default."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import onnxruntime

from qeff_proxy.backends.feeds import check_feeds
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qeff_proxy.arrays import Array
    from qeff_proxy.artifact import Export, ExportedPart
    from qeff_proxy.backends import CompileOptions

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeSession"]

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ONLY_FATAL = 4  # an error is raised, so that it need not be printed too


class OnnxRuntimeBackend:
    """Optimizes each part once, saves it, and runs it on the CPU."""

    options: Mapping[str, str] = {
        "optimization": "graph optimization level: none, basic, extended or all (default)",
        "save_optimized": "write the optimized graphs, so that opening is quick (default: true)",
    }

    values: Mapping[str, Any] = {"optimization": tuple(_LEVELS), "save_optimized": bool}

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime": onnxruntime.__version__}

    def devices(self) -> list[str]:
        """The one that it uses."""
        return ["CPU"]

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Optimize the part and write it to ``folder``."""
        if any(spec.dtype == "bfloat16" for spec in (*part.inputs, *part.outputs)):
            raise BackendError(
                f"ONNX Runtime's CPU kernels do not take bfloat16, which the {part.name} part has",
                "Export in float32 or float16.",
            )
        session_options = _session_options(options)
        if options.backend.get("save_optimized", True):
            target = folder / f"{part.name}.onnx"
            session_options.optimized_model_filepath = str(target)
            session_options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{part.name}.data"
            )
            session_options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
            )
        _open(export.folder / part.file, session_options, part.name)

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> OnnxRuntimeSession:
        """A session on the optimized graph, or on the export where none was saved."""
        session_options = _session_options(options)
        path = folder / f"{part.name}.onnx"
        if path.is_file():
            session_options.graph_optimization_level = _LEVELS["none"]
        else:
            path = export.folder / part.file
        return OnnxRuntimeSession(_open(path, session_options, part.name), part)


class OnnxRuntimeSession:
    """A part on ONNX Runtime's CPU.

    Args:
        session: The runtime's own session.
        part: What it runs, for messages.
    """

    def __init__(self, session: onnxruntime.InferenceSession, part: ExportedPart) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._part = part
        self._names = [spec.name for spec in part.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the part once (see `qeff_proxy.session.Session.run`)."""
        if self._session is None:
            raise BackendError(f"the session of the {self._part.name} part is closed")
        check_feeds(self._part.name, self._part.inputs, feeds)
        try:
            outputs = self._session.run(self._names, dict(feeds))
        except Exception as error:  # the runtime's exceptions share no public base class
            raise BackendError(
                f"ONNX Runtime failed on the {self._part.name} part: {_first_line(error)}"
            ) from error
        return dict(zip(self._names, outputs, strict=True))

    def close(self) -> None:
        """Release the runtime's session and the weights it maps."""
        self._session = None


def _session_options(options: CompileOptions) -> onnxruntime.SessionOptions:
    result = onnxruntime.SessionOptions()
    result.graph_optimization_level = _LEVELS[options.backend.get("optimization", "all")]
    result.log_severity_level = _ONLY_FATAL
    if options.num_cores is not None:
        # More threads than cores only wait for each other.
        result.intra_op_num_threads = min(options.num_cores, len(os.sched_getaffinity(0)))
    return result


def _open(
    path: Path, options: onnxruntime.SessionOptions, name: str
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's exceptions share no public base class
        if "No space left" in str(error):
            raise OSError(28, "No space left on device") from error
        raise BackendError(f"ONNX Runtime refuses the {name} part: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip()
    return next(iter(text.splitlines()), type(error).__name__)
