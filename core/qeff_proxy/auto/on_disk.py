"""Find an export and what was compiled by the paths that QEfficient's scripts pass on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import COMPILED, Compiled, compile_export
from qeff_proxy.common import arguments
from qeff_proxy.common.messages import first_line
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, UsageError


def export_of_graphs(paths: Sequence[str | Path], model_type: str) -> Export:
    """The export of a model, by its folder or by ONNX files in it.

    Raises:
        ArtifactError: There is no export.
        UsageError: The paths name several, or one of another model type.
    """
    folders = set()
    for path in paths:
        graph = arguments.path("onnx_path", path) or Path()
        folders.add(graph.parent if graph.suffix == ".onnx" else graph)
    if len(folders) > 1:
        raise UsageError("the ONNX files lie in several folders", "Name those of one export.")
    export = read_export(folders.pop().resolve())
    model = export.model
    if model["model_type"] != model_type:
        raise UsageError(
            f"{export.folder} is an export of {model['source']}, of model type "
            f"{model['model_type']!r}, and this model is of {model_type!r}",
            "Name an export of this model.",
        )
    return export


def compiled_in(folder: Path | None) -> Compiled:
    """What was compiled to a folder; compiled again if the export or the backend has changed."""
    if folder is None:
        raise UsageError("qpc_path is None", "Give the folder that compile returned.")
    try:
        value = json.loads((folder / COMPILED).read_text(encoding="utf-8"))
        options = value["options"]
        lengths = options["seq_len"] and tuple(options["seq_len"])
        options = CompileOptions(**{**options, "seq_len": lengths})
        backend = str(value["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder} holds nothing that was compiled ({first_line(error)})",
            "Name the folder that compile returned.",
        ) from error
    return compile_export(read_export(folder.resolve().parents[1]), backend, options)
