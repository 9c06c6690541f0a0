"""The errors, as one tree.

::

    ProxyError                 1   anything this package raises on purpose
    ├── UsageError             2   an argument that cannot be right
    ├── CheckpointError        3   the model cannot be found, read or trusted
    ├── UnsupportedModelError  4   no plugin knows how to cut this architecture
    ├── CutError               5   the recombined parts do not equal the uncut model
    ├── ExportError            6   a part cannot be turned into ONNX
    ├── ArtifactError          7   an export folder is damaged, busy or cannot be written
    ├── BackendError           8   a backend is missing, or refuses or fails on a part
    ├── DumpError              9   a dump is damaged, incomplete or cannot be written
    └── PluginError           10   a plugin cannot be used, or two claim the same model type

The number is the exit code of the command line; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendError",
    "CheckpointError",
    "CutError",
    "DumpError",
    "ExportError",
    "PluginError",
    "ProxyError",
    "UnsupportedModelError",
    "UsageError",
]


class ProxyError(Exception):
    """Base of every error raised on purpose.

    Args:
        problem: What is wrong, naming the thing at hand.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, hint: str | None = None) -> None:
        problem = " ".join(problem.split())  # messages of other libraries may have several lines
        stop = "" if problem.endswith("?") else "."
        super().__init__(f"{problem.rstrip('.')}{stop} {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


class UsageError(ProxyError):
    """An argument that cannot be right, whatever the model."""

    exit_code = 2


class CheckpointError(ProxyError):
    """The model cannot be found, read or trusted."""

    exit_code = 3


class UnsupportedModelError(ProxyError):
    """No plugin knows how to cut this architecture."""

    exit_code = 4


class CutError(ProxyError):
    """The recombined parts do not equal the uncut model."""

    exit_code = 5


class ExportError(ProxyError):
    """A part cannot be turned into ONNX."""

    exit_code = 6


class ArtifactError(ProxyError):
    """An export folder is damaged, in use, or cannot be written."""

    exit_code = 7


class BackendError(ProxyError):
    """A backend is missing, or it refuses or fails on a part."""

    exit_code = 8


class DumpError(ProxyError):
    """A dump is damaged, incomplete, or cannot be written."""

    exit_code = 9


class PluginError(ProxyError):
    """A plugin cannot be used, or two plugins claim the same model type."""

    exit_code = 10
