"""The ``onnxruntime`` backend: any machine's CPU, dynamic shapes. The default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from qeff_proxy.backends.onnxruntime.options import OPTIONS as WEIGHT_OPTIONS
from qeff_proxy.backends.onnxruntime.options import VALUES as WEIGHT_VALUES
from qeff_proxy.backends.onnxruntime.options import WEIGHT_NAMES
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.common.file_errors import try_writing
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    from qeff_proxy.artifact.export_folder import Export, ExportedPart
    from qeff_proxy.backends.onnxruntime.prepare import Prepared
    from qeff_proxy.compile_options import CompileOptions

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeSession"]

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_BRIEFLY = "briefly"
#: To wake a thread takes longer than most of a decode step's operators. Threads that wait this long
#: before they sleep are there for the next product, and keep a core from others for no longer.
_BRIEFLY_US = 20
_ONLY_FATAL = 4  # an error is raised, so that it need not be printed too
#: Counted up with each change of `onnxruntime_prepare`, so that parts are compiled anew.
_REWRITING = "2"


class OnnxRuntimeBackend:
    """Optimizes each part once, saves it, and runs it on the CPU.

    A part is prepared before it is optimized: its weights are quantized where that is asked for
    (`qeff_proxy.backends.onnxruntime.quantize`), and a decoder's cache is written in place where
    its graph allows it (`qeff_proxy.backends.onnxruntime.cache_in_place`).
    """

    options: Mapping[str, str] = {
        "optimization": "graph optimization level: none, basic, extended or all (default)",
        "save_optimized": "write the optimized graphs, so that opening is quick (default: true)",
        "in_place": "write a decoder's cache in place, where its graph allows it (default: true)",
        "spinning": "how long threads wait busily between operators: briefly (default), true: "
        "as long as ONNX Runtime lets them, which is slow where anything else runs, false: never",
        **WEIGHT_OPTIONS,
    }

    values: Mapping[str, Any] = {
        "optimization": tuple(_LEVELS),
        "save_optimized": bool,
        "in_place": bool,
        "spinning": (_BRIEFLY, True, False),
        **WEIGHT_VALUES,
    }

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version, and that of how graphs are rewritten for it."""
        return {"onnxruntime": onnxruntime.__version__, "rewriting": _REWRITING}

    def devices(self) -> list[str]:
        """The one that it uses."""
        return ["CPU"]

    def precision(self, options: CompileOptions) -> str | None:
        """What the weights were cut to, of the part that lost most."""
        kinds = [str(options.backend.get(name, "float")).lower() for name in WEIGHT_NAMES]
        return next((f"{kind}_weights" for kind in ("int4", "int8") if kind in kinds), None)

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Prepare and optimize the part and write it to ``folder``."""
        if any(spec.dtype == "bfloat16" for spec in (*part.inputs, *part.outputs)):
            raise BackendError(
                f"ONNX Runtime's CPU kernels do not take bfloat16, which the {part.name} part has",
                "Export in float32 or float16.",
            )
        from qeff_proxy.backends.onnxruntime.prepare import prepare_part

        prepared = prepare_part(export, part, options, folder)
        if not options.backend.get("save_optimized", True):
            _open(prepared, _session_options(options), part.name)
            return
        session_options = _session_options(options)
        session_options.optimized_model_filepath = str(folder / f"{part.name}.onnx")
        session_options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{part.name}.data"
        )
        session_options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        _open(prepared, session_options, part.name)
        prepared.remove()

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> OnnxRuntimeSession:
        """A session on the optimized graph, or on the prepared one where none was saved."""
        from qeff_proxy.backends.onnxruntime.prepare import Prepared, prepared_part

        session_options = _session_options(options)
        path = folder / f"{part.name}.onnx"
        if path.is_file():
            session_options.graph_optimization_level = _LEVELS["none"]
            prepared = Prepared(path)
        else:
            prepared = prepared_part(export, part, folder)
        return OnnxRuntimeSession(_open(prepared, session_options, part.name), part)


def _session_options(options: CompileOptions) -> onnxruntime.SessionOptions:
    result = onnxruntime.SessionOptions()
    result.graph_optimization_level = _LEVELS[options.backend.get("optimization", "all")]
    result.log_severity_level = _ONLY_FATAL
    spinning = options.backend.get("spinning", _BRIEFLY)
    if spinning is False:
        result.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif spinning == _BRIEFLY:
        result.add_session_config_entry("session.intra_op.spin_duration_us", str(_BRIEFLY_US))
    else:
        # Parts take turns, each with threads of its own: those of one that has run must not keep
        # the cores from the next.
        result.add_session_config_entry("session.force_spinning_stop", "1")
    if options.num_cores is not None:
        # More threads than cores only wait for each other.
        result.intra_op_num_threads = min(options.num_cores, len(os.sched_getaffinity(0)))
    return result


def _open(
    prepared: Prepared, options: onnxruntime.SessionOptions, name: str
) -> onnxruntime.InferenceSession:
    source: str | bytes = str(prepared.graph)
    if prepared.weights is not None:
        # A graph may point into files of its own folder alone, unless it comes as bytes.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(prepared.weights)
        )
        source = prepared.graph.read_bytes()
    try:
        return onnxruntime.InferenceSession(
            source, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's exceptions share no public base class
        if options.optimized_model_filepath:  # it was to be saved, and the runtime says no reason
            try_writing(Path(options.optimized_model_filepath).parent)
        raise BackendError(f"ONNX Runtime refuses the {name} part: {first_line(error)}") from error
