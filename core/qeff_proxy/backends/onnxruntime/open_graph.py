"""Open and run a graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime

if TYPE_CHECKING:
    from qeff_proxy.arrays import Array

__all__ = ["open_graph", "run_graph"]

_ONLY_FATAL = 4  # an error is raised, so it need not be printed too


def open_graph(
    graph: Path | bytes,
    settings: onnxruntime.SessionOptions | None = None,
    *,
    weights: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph.

    Args:
        graph: The ONNX file, or its bytes.
        settings: The runtime's own settings.
        weights: The folder of its weights; ``None``: that of the file.
    """
    settings = settings or onnxruntime.SessionOptions()
    settings.log_severity_level = _ONLY_FATAL
    if weights is not None:
        # The runtime takes weights from another folder only for a graph that comes as bytes.
        graph = graph.read_bytes() if isinstance(graph, Path) else graph
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights)
        )
    return onnxruntime.InferenceSession(
        graph, sess_options=settings, providers=["CPUExecutionProvider"]
    )


def run_graph(
    session: onnxruntime.InferenceSession, known: Mapping[str, Array]
) -> dict[str, Array]:
    """All outputs of a graph, by name; ``known`` has its inputs, and may have more."""
    names = [value.name for value in session.get_outputs()]
    inputs = {value.name: known[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))
