"""The export that a backend is tried on, compiled by it, and the sessions on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.backend import Backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.session.session import Session
from qeff_proxy.testing.backend_parts import Reference


class _Suite(Protocol):
    """What the suite says of the backend on trial."""

    @property
    def compile_options(self) -> CompileOptions: ...

    def make_backend(self) -> Backend: ...

    def make_export(self, folder: Path, dtype: str) -> Export: ...


class BackendSubject:
    """The export, compiled by the backend on trial, and its sessions; shared by all checks.

    Args:
        suite: What is tried, and how.
        folder: New or empty.
    """

    def __init__(self, suite: _Suite, folder: Path) -> None:
        self.suite = suite
        self.folder = folder
        self._compiled: dict[str, tuple[Export, Path]] = {}

    @cached_property
    def backend(self) -> Backend:
        """The backend on trial."""
        return self.suite.make_backend()

    def compiled(self, dtype: str = "float32") -> tuple[Export, Path]:
        """An export of this dtype and the folder of what the backend made of it."""
        if dtype not in self._compiled:
            export = self.suite.make_export(self.folder / f"export-{dtype}", dtype)
            made = self.folder / f"making-{dtype}"
            made.mkdir()
            for part in export.parts:
                self.backend.compile(export, part, self.suite.compile_options, made)
            # What is compiled is moved into place when it is whole, so it must not know its path.
            self._compiled[dtype] = (export, made.rename(self.folder / f"compiled-{dtype}"))
        return self._compiled[dtype]

    def parts(self, dtype: str = "float32") -> tuple[ExportedPart, ...]:
        """The parts of the export."""
        return self.compiled(dtype)[0].parts

    @contextmanager
    def session(self, part: ExportedPart, dtype: str = "float32") -> Iterator[Session]:
        """A new session on a part, closed at the end."""
        export, folder = self.compiled(dtype)
        session = self.suite.make_backend().open(export, part, self.suite.compile_options, folder)
        try:
            yield session
        finally:
            session.close()

    def reference(self, part: ExportedPart, dtype: str = "float32") -> Reference:
        """What the part must give."""
        return Reference(self.compiled(dtype)[0], part)
