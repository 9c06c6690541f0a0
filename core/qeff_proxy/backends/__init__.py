"""Backends: what compiles and runs parts.

A backend is one class in a module of its own, imported on first use. A package registers its
own as an entry point of the group ``qeff_proxy.backends``: the name users type → the class.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from qeff_proxy.arguments import flag, one_of, whole_number
from qeff_proxy.errors import BackendError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qeff_proxy.artifact import Export, ExportedPart
    from qeff_proxy.session import Session

__all__ = [
    "BUILTIN_BACKENDS",
    "ENTRY_POINT_GROUP",
    "Backend",
    "CompileOptions",
    "check_options",
    "is_static",
    "load_backend",
    "precision_of",
]

ENTRY_POINT_GROUP = "qeff_proxy.backends"
BUILTIN_BACKENDS = {
    "onnxruntime": "qeff_proxy.backends.onnxruntime_backend:OnnxRuntimeBackend",
    "openvino": "qeff_proxy.backends.openvino_backend:OpenVinoBackend",
    "qaic": "qeff_proxy.backends.qaic_backend:QaicBackend",
    "qnn": "qeff_proxy.backends.qnn_backend:QnnBackend",
    "torch": "qeff_proxy.backends.torch_backend:TorchBackend",
}


@dataclass(frozen=True)
class CompileOptions:
    """What a user asks of ``compile``, whatever the backend.

    Attributes:
        batch_size: Rows of the batch, for backends of static shapes.
        prefill_seq_len: Tokens of a prefill chunk; longer prompts are run in chunks of this size.
            ``None``: the whole prompt at once.
        ctx_len: Most positions, prompt and generated tokens together. ``None``: as many as the
            model has.
        seq_len: Lengths that inputs of a single pass are padded to, each to the nearest that is
            long enough. ``None``: to the longest of the batch.
        num_cores: Cores to use: threads on a CPU. ``None``: the backend's own choice.
        backend: What only one backend understands, by name.
    """

    batch_size: int = 1
    prefill_seq_len: int | None = None
    ctx_len: int | None = None
    seq_len: tuple[int, ...] | None = None
    num_cores: int | None = None
    backend: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_seq_len", "ctx_len", "num_cores"):
            value = getattr(self, name)
            if value is not None or name == "batch_size":
                whole_number(name, value)
        for length in self.seq_len if self.seq_len is not None else ():
            whole_number("a length of seq_len", length)
        if self.seq_len == ():
            raise UsageError("seq_len is empty", "Name a length or several, or leave it out.")
        if self.ctx_len and self.prefill_seq_len and self.prefill_seq_len > self.ctx_len:
            raise UsageError(
                f"prefill_seq_len ({self.prefill_seq_len}) is larger than ctx_len ({self.ctx_len})",
                "A prefill chunk must fit into the context.",
            )

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object."""
        lengths = list(self.seq_len) if self.seq_len is not None else None
        return {**vars(self), "seq_len": lengths, "backend": dict(self.backend)}


class Backend(Protocol):
    """What a backend does; made anew for each compilation.

    A backend may have attributes more:

    - ``static``: ``True``, or a method of the `CompileOptions` that says so: it compiles fixed
      shapes (see `qeff_proxy.static`), so ``ctx_len`` and ``prefill_seq_len`` are always set when
      `compile` and `open` are called.
    - ``precision``: the dtype (or a method, likewise) that it computes in, whatever that of the
      tensors (``"float16"``, ``"a16w8"``); `qeff_proxy.verify` holds it to what that allows.
    - ``fingerprint(options)``: hashes of the files that its options name, by what they are. They
      go into the key of what was compiled. An option ``calibration`` takes a folder of dumps
      (`qeff_proxy.calibration`).
    - ``values``: what each of its options takes: ``bool``, ``int`` (above 0), ``str``, or a tuple
      of the values that there are. Others are refused before anything is compiled.
    - ``untimed``: why its seconds say nothing here (it is emulated, there is no such device), or a
      method of the `CompileOptions`; ``None``: they do. Such a backend is never the quickest.
    - ``use_hooks(hooks)``: called before `open` with the hooks of the model's family, for a
      backend that cuts the model itself.
    """

    #: The options it understands in `CompileOptions.backend`, with what they mean.
    options: Mapping[str, str]

    def versions(self) -> Mapping[str, str]:
        """Versions of the compiler and runtime, which go into the key of what was compiled."""

    def compile(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> None:
        """Write into ``folder`` what `open` needs besides the export.

        Raises:
            BackendError: The backend refuses the part; names operator and node where it can.
        """

    def open(
        self, export: Export, part: ExportedPart, options: CompileOptions, folder: Path
    ) -> Session:
        """A session on what `compile` wrote into ``folder``."""


def check_options(name: str, backend: Backend, options: CompileOptions) -> None:
    """Refuse options that a backend does not have, and values that its options do not take.

    Args:
        name: Of the backend.
        backend: It.
        options: What a user gave.

    Raises:
        UsageError: Names the option.
    """
    unknown = sorted(set(options.backend) - set(backend.options), key=str)
    if unknown:
        known = ", ".join(sorted(backend.options)) or "none"
        raise UsageError(f"backend {name!r} has no option {unknown[0]!r}", f"Its options: {known}.")
    values: Mapping[str, Any] = getattr(backend, "values", {})
    for option, value in options.backend.items():
        takes = values.get(option)
        if isinstance(takes, tuple):
            one_of(option, value, takes)
        elif takes is bool:
            flag(option, value)
        elif takes is int:
            whole_number(option, value)
        elif takes is not None and not isinstance(value, takes):
            raise UsageError(f"{option} is {value!r}", "It must be text.")


def is_static(backend: Backend, options: CompileOptions) -> bool:
    """Whether a backend compiles fixed shapes, with these options."""
    static = getattr(backend, "static", False)
    return bool(static(options) if callable(static) else static)


def precision_of(backend: Backend, options: CompileOptions) -> str | None:
    """What a backend computes in, with these options; ``None``: the dtype of the tensors."""
    precision = getattr(backend, "precision", None)
    found: str | None = precision(options) if callable(precision) else precision
    return found


def load_backend(name: str) -> Backend:
    """Make the backend called ``name``.

    Raises:
        BackendError: There is none of that name, or what it needs is not installed.
    """
    if not isinstance(name, str):
        raise UsageError(f"backend is {name!r}", "Give the name of a backend.")
    target = BUILTIN_BACKENDS.get(name)
    if target is None:
        return _registered_backend(name)
    module, _, attribute = target.partition(":")
    try:
        return cast("Backend", getattr(importlib.import_module(module), attribute)())
    except ImportError as error:
        from qeff_proxy.backends.discovery import install_hint

        raise BackendError(
            f"backend {name!r} cannot be used: {error}", install_hint(name)
        ) from error


def _registered_backend(name: str) -> Backend:
    from importlib_metadata import EntryPoint

    from qeff_proxy.backends.discovery import check_class
    from qeff_proxy.plugin_discovery import find_entries

    found, _ = find_entries(ENTRY_POINT_GROUP)
    entries = [entry for entry in found if entry.model_type == name]
    if not entries:
        known = sorted({*BUILTIN_BACKENDS, *(entry.model_type for entry in found)})
        raise BackendError(f"there is no backend {name!r}", f"Known are {', '.join(known)}.")
    if len(entries) > 1:
        packages = " and ".join(sorted({entry.distribution for entry in entries}))
        raise BackendError(f"{packages} both have a backend {name!r}", "Uninstall one of them.")
    (entry,) = entries
    try:
        return check_class(EntryPoint(name, entry.value, ENTRY_POINT_GROUP).load())()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BackendError(
            f"backend {name!r} of package {entry.distribution} cannot be used: {reason}",
            "Repair the package, or choose another backend.",
        ) from error
