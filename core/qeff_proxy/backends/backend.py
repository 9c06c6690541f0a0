"""The base class of backends, with a default for everything but compiling and opening a part."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.common.arguments import flag, one_of, whole_number
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.hooks import Hooks

if TYPE_CHECKING:
    import onnx_ir as ir

    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
    from qeff_proxy.session.session import Session


class Backend(ABC):
    """Compiles the parts of an export, and opens sessions on them.

    A subclass must have `versions`, `compile` and `open`, and overrides what differs of the rest.
    It takes no arguments; an instance is made for each compilation.
    `qeff_proxy.backends.onnxruntime.backend` is the one to read first.
    """

    #: Its options (keys of `CompileOptions.backend`), each with a sentence for the user.
    options: Mapping[str, str] = {}
    #: The values that options take: ``bool``, ``int`` (above 0), ``str``, or a tuple of all
    #: values. Others are refused before anything is compiled. An option that is not here checks
    #: its values itself. An option ``calibration`` takes a folder of dumps
    #: (`qeff_proxy.run.calibration`).
    values: Mapping[str, Any] = {}
    #: The precisions that it can compute in, by the names that all backends share (``fp16``,
    #: ``bf16``, ``int8``, ``int4``, ``a16w8``, ``a8w8``), and the options that choose each.
    precisions: Mapping[str, Mapping[str, Any]] = {}

    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Versions of compiler and runtime. Another version compiles anew."""

    @abstractmethod
    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Write into ``folder`` what `open` needs besides the export.

        Raises:
            BackendError: The backend refuses the part; names operator and node where it can.
        """

    @abstractmethod
    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on what `compile` wrote into ``folder``."""

    def open_once(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """Compile a part that runs a few times and is then closed, such as a single layer."""
        self.compile(export, part, options, folder)
        return self.open(export, part, options, folder)

    def devices(self) -> Sequence[str]:
        """The devices of this machine that it can use."""
        return ()

    def needs_fixed_shapes(self, options: CompileOptions) -> bool:  # noqa: ARG002
        """Whether it compiles fixed shapes.

        If so, ``ctx_len`` and ``prefill_seq_len`` are always set in `compile` and `open`.
        """
        return False

    def precision(self, options: CompileOptions) -> str | None:  # noqa: ARG002
        """What it computes in (``"float16"``, ``"a16w8"``), if that is not the tensors' dtype.

        `qeff_proxy.verify` allows the errors of that precision.
        """
        return None

    def lowers(self, part: ExportedPart, options: CompileOptions) -> bool:  # noqa: ARG002
        """Whether a lower precision is that of a part, too, and not only of others."""
        return True

    def is_calibrated(self, options: CompileOptions) -> bool:  # noqa: ARG002
        """Whether it computes in a precision for which it needs inputs to calibrate on."""
        return False

    def untimed(self, options: CompileOptions) -> str | None:  # noqa: ARG002
        """Why its speed here means nothing, such as an emulator; ``None`` if it is meaningful.

        Such a backend is never chosen as the quickest.
        """
        return None

    def fingerprint(self, options: CompileOptions) -> Mapping[str, str]:  # noqa: ARG002
        """Hashes of the contents of files that its options name. Other contents compile anew."""
        return {}

    def write_nodes(self, graph: Path, nodes: Sequence[ir.Node], folder: Path) -> None:
        """Write what stays wide for other tools: by default the names that quantizers exclude.

        Args:
            graph: The exported file of a part.
            nodes: Those of it that stay wide.
            folder: Where to write files, whose names begin as the graph's.
        """
        excluded = {"nodes_to_exclude": [str(node.name) for node in nodes]}
        text = json.dumps(excluded, indent=2) + "\n"
        (folder / f"{graph.stem}.nodes.json").write_text(text, "utf-8")

    def use_hooks(self, hooks: Hooks) -> None:  # noqa: B027 (most backends need no hooks)
        """Called before `open` with the hooks of the model's family, to cut the model again."""

    def check_options(self, name: str, options: CompileOptions) -> None:
        """Check the names of its options and, against `values`, what they are set to.

        Args:
            name: The backend's name, for messages.
            options: What the user asked for.

        Raises:
            UsageError: An option is unknown, or its value is wrong; names the option.
        """
        unknown = sorted(set(options.backend) - set(self.options), key=str)
        if unknown:
            known = ", ".join(sorted(self.options)) or "none"
            raise UsageError(
                f"backend {name!r} has no option {unknown[0]!r}", f"Its options: {known}."
            )
        for option, value in options.backend.items():
            allowed = self.values.get(option)
            if isinstance(allowed, tuple):
                one_of(option, value, allowed)
            elif allowed is bool:
                flag(option, value)
            elif allowed is int:
                whole_number(option, value)
            elif allowed is not None and not isinstance(value, allowed):
                raise UsageError(f"{option} is {value!r}", "It must be text.")


def usable_cores(options: CompileOptions) -> int | None:
    """``num_cores``, but no more than this process may use: more threads wait for each other."""
    if options.num_cores is None:
        return None
    return min(options.num_cores, len(os.sched_getaffinity(0)))
