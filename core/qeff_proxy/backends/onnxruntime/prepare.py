"""What ONNX Runtime is given in place of an exported graph: a rewritten one, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qeff_proxy.backends.onnxruntime.cache_in_place import write_in_place
from qeff_proxy.backends.onnxruntime.fuse_norms import divide_in_norms
from qeff_proxy.backends.onnxruntime.fuse_products import merge_products
from qeff_proxy.backends.onnxruntime.fuse_rotary import fuse_rotary
from qeff_proxy.backends.onnxruntime.options import WeightOptions
from qeff_proxy.backends.onnxruntime.quantize import quantize_weights
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import BackendError
from qeff_proxy.tensor_names import PAST

if TYPE_CHECKING:
    from qeff_proxy.artifact.export_folder import Export, ExportedPart
    from qeff_proxy.compile_options import CompileOptions

__all__ = ["Prepared", "prepare_part", "prepared_part"]


@dataclass(frozen=True)
class Prepared:
    """A graph, ready to be read.

    Attributes:
        graph: Its file.
        weights: The folder that its weights lie in; ``None``: its own.
        own: The files that were written for it.
    """

    graph: Path
    weights: Path | None = None
    own: tuple[Path, ...] = ()

    def remove(self) -> None:
        """Delete what was written for it."""
        for path in self.own:
            path.unlink(missing_ok=True)


def prepare_part(
    export: Export, part: ExportedPart, options: CompileOptions, folder: Path
) -> Prepared:
    """Rewrite a part's graph as the options ask; the exported one, where there is nothing to do.

    Raises:
        BackendError: The graph is damaged, or its weights cannot be quantized.
        UsageError: An option is none of its values.
    """
    weights = WeightOptions.of(part.name, options.backend)
    source = export.folder / part.file
    try:
        model = ir.load(source)
    except Exception as error:  # protobuf's exceptions share no public base class
        line = first_line(error)
        raise BackendError(f"the graph of the {part.name} part is damaged: {line}") from error
    graph, data = folder / f"{part.name}.prepared.onnx", folder / f"{part.name}.prepared.data"
    with _quiet():
        changed = [
            options.backend.get("in_place", True) and write_in_place(model, part),
            divide_in_norms(model),
            fuse_rotary(model),
            _merges(part, options) and merge_products(model),
            weights.bits is not None and quantize_weights(model, data, weights),
        ]
    if not any(changed):
        return Prepared(source)
    ir.save(model, graph)
    return prepared_part(export, part, folder)


def prepared_part(export: Export, part: ExportedPart, folder: Path) -> Prepared:
    """What `prepare_part` left in ``folder``, or the export."""
    graph, data = folder / f"{part.name}.prepared.onnx", folder / f"{part.name}.prepared.data"
    if not graph.is_file():
        return Prepared(export.folder / part.file)
    if data.is_file():
        return Prepared(graph, None, (graph, data))
    return Prepared(graph, export.folder, (graph,))


def _merges(part: ExportedPart, options: CompileOptions) -> bool:
    """Whether products are merged: in decoders, whose steps wait more than they compute.

    Not where weights are quantized one by one, nor where the runtime would join them at each step.
    """
    decodes = any(spec.name.startswith(PAST) for spec in part.inputs)
    whole = WeightOptions.of(part.name, options.backend).bits is None
    return decodes and whole and options.backend.get("optimization") != "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx_ir from telling what it removes."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
