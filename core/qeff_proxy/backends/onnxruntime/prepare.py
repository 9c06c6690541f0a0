"""Rewrite an exported graph for ONNX Runtime.

`prepare_part` applies, in this order: `write_in_place`, `divide_in_norms`, `fuse_rotary`,
`merge_products` and `quantize_weights`. `qeff_proxy.backends.onnxruntime.check_rewriting` compares
the result with the exported graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.onnxruntime.cache_in_place import write_in_place
from qeff_proxy.backends.onnxruntime.fuse_norms import divide_in_norms
from qeff_proxy.backends.onnxruntime.fuse_products import merge_products
from qeff_proxy.backends.onnxruntime.fuse_rotary import fuse_rotary
from qeff_proxy.backends.onnxruntime.options import WeightOptions
from qeff_proxy.backends.onnxruntime.quantize import quantize_weights
from qeff_proxy.backends.onnxruntime.rewritten_graph import RewrittenGraph
from qeff_proxy.backends.recipe import name_units_of, wide_nodes
from qeff_proxy.common.messages import first_line
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.tensor_names import PAST


def prepare_part(
    export: Export,
    part: ExportedPart,
    options: CompileOptions,
    folder: Path,
    *,
    in_place: bool = True,
    fuse: bool = True,
    merge: bool = True,
) -> RewrittenGraph:
    """Rewrite a part's graph as the options ask; the exported one if there is nothing to do.

    Args:
        export: The export.
        part: Which of its parts.
        options: The options of the compilation.
        folder: Where the graph goes.
        in_place: Whether the cache may be written in place.
        fuse: Whether operators may be fused.
        merge: Whether products may be merged too, which copies their weights.

    Raises:
        BackendError: The graph is damaged, or its weights cannot be quantized.
    """
    weights = WeightOptions.of(part.name, options.backend)
    try:
        model = ir.load(export.folder / part.file)
    except Exception as error:  # protobuf's exceptions share no public base class
        line = first_line(error)
        raise BackendError(f"the graph of the {part.name} part is damaged: {line}") from error
    name_units_of(model, export, part)
    wide = wide_nodes(options.backend)
    graph, data = RewrittenGraph.paths(part, folder)
    with _quiet():
        changed = [
            in_place and write_in_place(model, part),
            fuse and divide_in_norms(model),
            fuse and fuse_rotary(model),
            fuse and merge and _merges(part, weights, options) and merge_products(model),
            weights.replaces and quantize_weights(model, data, weights, wide),
        ]
    if any(changed):
        ir.save(model, graph)
    return RewrittenGraph.of(export, part, folder)


def _merges(part: ExportedPart, weights: WeightOptions, options: CompileOptions) -> bool:
    """Whether products are merged: in decoders, whose steps spend more time waiting than computing.

    Not if weights are quantized one by one, nor if the runtime would join them again at each step.
    """
    decodes = any(spec.name.startswith(PAST) for spec in part.inputs)
    return decodes and not weights.replaces and options.backend.get("optimization") != "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx_ir from logging what it removes."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
