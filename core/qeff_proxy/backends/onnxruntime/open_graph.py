"""Open and run a graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

_ONLY_FATAL = 4  # an error is raised, so it need not be printed too
#: The optimizers that write copies of weights.
COPYING = ("ConstantFolding",)
_FOLDER = "session.model_external_initializers_file_folder_path"


def open_graph(
    graph: Path | bytes,
    settings: onnxruntime.SessionOptions | None = None,
    *,
    weights: Path | None = None,
    without: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Open a graph.

    Args:
        graph: The ONNX file, or its bytes.
        settings: The runtime's own settings.
        weights: The folder of its weights; ``None``: that of the file.
        without: Names of optimizers that are not to run.
    """
    settings = settings or onnxruntime.SessionOptions()
    settings.log_severity_level = _ONLY_FATAL
    if weights is not None:
        # The runtime takes weights from another folder only for a graph that comes as bytes.
        graph = graph.read_bytes() if isinstance(graph, Path) else graph
        try:  # settings may have opened another graph, and the runtime warns of what is set twice
            known = settings.get_session_config_entry(_FOLDER)
        except RuntimeError:  # nothing is set
            known = None
        if known != str(weights):
            settings.add_session_config_entry(_FOLDER, str(weights))
    return onnxruntime.InferenceSession(
        graph,
        sess_options=settings,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(without),
    )


def open_to_check(graph: Path) -> onnxruntime.InferenceSession:
    """Open an exported graph for a run or two, with its weights mapped and not copied.

    It runs with all of ONNX Runtime's optimizations except constant folding, which would write a
    transposed copy of each weight. Without any optimization, each run would transpose the weights
    (32 s and 2.8 GB for a head of 262,208 x 2,560, instead of 2 s and 0.1 GB).
    """
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return open_graph(graph, map_weights(settings), without=COPYING)


def map_weights(settings: onnxruntime.SessionOptions) -> onnxruntime.SessionOptions:
    """Change settings for a few runs: weights stay mapped, and free memory is returned at once."""
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.enable_cpu_mem_arena = False
    settings.enable_mem_pattern = False
    return settings


def run_graph(
    session: onnxruntime.InferenceSession, known: Mapping[str, Array]
) -> dict[str, Array]:
    """All outputs of a graph, by name; ``known`` has its inputs, and may have more."""
    names = [value.name for value in session.get_outputs()]
    inputs = {value.name: known[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))
