"""The ``onnxruntime`` backend: any machine's CPU, dynamic shapes. The default.

It is the model for other backends: a class derived from `Backend` that holds only what differs.
For each part,

1. `OnnxRuntimeBackend.compile` rewrites the graph for this runtime (`prepare_part`): the cache is
   written in place, operators are fused, weights are quantized where that is asked for;
2. the runtime optimizes the graph, and saves it with its weights in the compiled folder;
3. the result is compared with the exported graph (`computes_the_same`); where it differs, the part
   is compiled again with its cache copied, and then without fusions;
4. `OnnxRuntimeBackend.open` opens the saved graph (`open_graph`);
5. `OnnxRuntimeSession` runs it.

Options are in `qeff_proxy.backends.onnxruntime.options`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import onnxruntime

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.onnxruntime.check_rewriting import can_be_compared, computes_the_same
from qeff_proxy.backends.onnxruntime.open_graph import COPYING, map_weights, open_graph
from qeff_proxy.backends.onnxruntime.options import (
    OPTIONS,
    PRECISIONS,
    VALUES,
    WEIGHT_NAMES,
    WeightOptions,
    runtime_settings,
)
from qeff_proxy.backends.onnxruntime.rewritten_graph import RewrittenGraph
from qeff_proxy.backends.onnxruntime.session import OnnxRuntimeSession
from qeff_proxy.backends.recipe import OPTION
from qeff_proxy.common.file_errors import try_writing
from qeff_proxy.common.messages import first_line
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError

#: Counted up with each change of `prepare_part`, so that parts are compiled anew.
_REWRITING = "4"

#: Whether a graph's cache is written in place, and whether operators are fused.
_Rewriting = tuple[bool, bool]


class OnnxRuntimeBackend(Backend):
    """Optimizes each part once, saves it, and runs it on the CPU."""

    options = OPTIONS
    values = VALUES
    precisions = PRECISIONS

    @cached_property
    def _checked(self) -> dict[str, _Rewriting]:
        """By structure, the rewriting of graphs that ran once: it is right for others like them."""
        return {}

    def check_options(self, name: str, options: CompileOptions) -> None:
        """Refuse a recipe where no weights are quantized, too."""
        super().check_options(name, options)
        if OPTION in options.backend and self.precision(options) is None:
            raise UsageError(
                "a recipe says what stays float, and all weights do",
                "Say what the others are, such as weights=int8.",
            )

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version, and that of how graphs are rewritten for it."""
        return {"onnxruntime": onnxruntime.__version__, "rewriting": _REWRITING}

    def devices(self) -> list[str]:
        """The CPU, the only device that this backend uses."""
        return ["CPU"]

    def precision(self, options: CompileOptions) -> str | None:
        """``"int8_weights"`` or ``"int4_weights"``: the coarsest that weights are quantized to."""
        kinds = [str(options.backend.get(name, "float")).lower() for name in WEIGHT_NAMES]
        return next((f"{kind}_weights" for kind in ("int4", "int8") if kind in kinds), None)

    def lowers(self, part: ExportedPart, options: CompileOptions) -> bool:
        """Whether the weights of a part are quantized."""
        return WeightOptions.of(part.name, options.backend).bits is not None

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Rewrite and optimize the part, and save it in ``folder``."""
        settings = runtime_settings(options)
        save = options.backend.get("save_optimized", True)
        if save:
            data = "session.optimized_model_external_initializers"
            settings.optimized_model_filepath = str(folder / f"{part.name}.onnx")
            settings.add_session_config_entry(f"{data}_file_name", f"{part.name}.data")
            settings.add_session_config_entry(f"{data}_min_size_in_bytes", "1024")
        graph, session = _compiled(export, part, options, folder, settings)
        session.close()
        if save:
            graph.remove()

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> OnnxRuntimeSession:
        """A session on the optimized graph, or on the rewritten one if that was not saved."""
        settings = runtime_settings(options)
        graph = RewrittenGraph(folder / f"{part.name}.onnx")
        if graph.path.is_file():  # it is optimized already
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:
            graph = RewrittenGraph.of(export, part, folder)
        return OnnxRuntimeSession(_open(graph, settings, part), part)

    def open_once(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> OnnxRuntimeSession:
        """A session on weights that stay mapped; nothing is saved, no product is merged."""
        settings = runtime_settings(options)
        if not WeightOptions.of(part.name, options.backend).replaces:
            # Of quantized weights it would compute products in float32, and not as compiled.
            map_weights(settings)
        return _compiled(export, part, options, folder, settings, self._checked)[1]


def _compiled(
    export: Export,
    part: ExportedPart,
    options: CompileOptions,
    folder: Path,
    settings: onnxruntime.SessionOptions,
    checked: dict[str, _Rewriting] | None = None,
) -> tuple[RewrittenGraph, OnnxRuntimeSession]:
    """Rewrite and open a part; with less rewriting where it differs from the exported graph.

    With ``checked`` it runs once: its weights stay where they are, and a graph that differs from
    one in ``checked`` in names and weights alone is not compared again.
    """
    # Imported here: they need onnx_ir, which takes most of a second and is not used to run.
    from qeff_proxy.backends.onnxruntime.prepare import prepare_part
    from qeff_proxy.graph.structure import structure_of_file

    if any(spec.dtype == "bfloat16" for spec in (*part.inputs, *part.outputs)):
        raise BackendError(
            f"ONNX Runtime's CPU kernels do not take bfloat16, which the {part.name} part has",
            "Export in float32 or float16.",
        )
    quantized = WeightOptions.of(part.name, options.backend).replaces
    once = checked is not None
    kind = structure_of_file(export.folder / part.file) if once and not quantized else ""
    known = checked.get(kind) if checked is not None else None
    fuse = can_be_compared(export, part)
    in_place = options.backend.get("in_place", fuse)
    if known is not None:
        in_place, fuse = known
    while True:
        graph = prepare_part(
            export, part, options, folder, in_place=in_place, fuse=fuse, merge=not once
        )
        without = COPYING if once else ()
        session = OnnxRuntimeSession(_open(graph, settings, part, without), part)
        in_place = session.runs_in_place()
        rewritten = bool(graph.written) and (in_place or fuse) and known is None
        if not rewritten or computes_the_same(session, export, part, quantized=quantized):
            if checked is not None and kind:
                checked[kind] = in_place, fuse
            return graph, session
        session.close()
        if options.backend.get("in_place") or not in_place:
            how = "in place" if in_place else "with fused operators"
            warnings.warn(
                f"the {part.name} part is not shown to equal its exported graph when it runs "
                f"{how}; it is compiled without",
                UserWarning,
                stacklevel=2,
            )
        for path in folder.glob(f"{part.name}.*"):
            path.unlink()
        in_place, fuse = False, fuse and in_place


def _open(
    graph: RewrittenGraph,
    settings: onnxruntime.SessionOptions,
    part: ExportedPart,
    without: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    try:
        return open_graph(graph.path, settings, weights=graph.weights, without=without)
    except Exception as error:  # the runtime's exceptions share no public base class
        if settings.optimized_model_filepath:  # the runtime does not say why it could not write
            try_writing(Path(settings.optimized_model_filepath).parent)
        raise BackendError(
            f"ONNX Runtime refuses the {part.name} part: {first_line(error)}"
        ) from error
