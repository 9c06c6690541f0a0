"""The files that `qeff_proxy.backends.onnxruntime.prepare` leaves for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart


@dataclass(frozen=True)
class RewrittenGraph:
    """A part's graph in the compiled folder, or the exported one where nothing was rewritten.

    Attributes:
        path: Its file.
        weights: The folder of its weights; ``None``: that of the file.
        written: The files that were written for it.
    """

    path: Path
    weights: Path | None = None
    written: tuple[Path, ...] = ()

    @classmethod
    def of(cls, export: Export, part: ExportedPart, folder: Path) -> RewrittenGraph:
        """What was written for a part into ``folder``."""
        graph, data = cls.paths(part, folder)
        if not graph.is_file():
            return cls(export.folder / part.file)
        if data.is_file():
            return cls(graph, None, (graph, data))
        return cls(graph, export.folder, (graph,))

    @staticmethod
    def paths(part: ExportedPart, folder: Path) -> tuple[Path, Path]:
        """Where a part's graph goes, and its weights if they are written again."""
        return folder / f"{part.name}.prepared.onnx", folder / f"{part.name}.prepared.data"

    def remove(self) -> None:
        """Delete the files that were written."""
        for path in self.written:
            path.unlink(missing_ok=True)
