"""The base class of backends that compile fixed shapes and leave the vocabulary to the host."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.session.session import Session

from qeff_proxy_npu.fixed_shapes.check_padding import check_padding
from qeff_proxy_npu.fixed_shapes.plan import runs_on_host

__all__ = ["FixedShapesBackend"]


class FixedShapesBackend(Backend):
    """A backend of fixed shapes; ONNX Runtime runs the parts that hold the vocabulary."""

    def needs_fixed_shapes(self, options: CompileOptions) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def lowers(self, part: ExportedPart, options: CompileOptions) -> bool:  # noqa: ARG002
        """Not those that the host runs."""
        return not runs_on_host(part)

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Compile the part, or have ONNX Runtime compile it."""
        if runs_on_host(part):
            OnnxRuntimeBackend().compile(export, part, replace(options, backend={}), folder)
        else:
            check_padding(export, part)
            self.compile_part(export, part, options, folder)

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on the part."""
        if runs_on_host(part):
            return OnnxRuntimeBackend().open(export, part, replace(options, backend={}), folder)
        return self.open_part(export, part, options, folder)

    @abstractmethod
    def compile_part(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """As `Backend.compile`, for a part without the vocabulary."""

    @abstractmethod
    def open_part(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """As `Backend.open`, for a part without the vocabulary."""
