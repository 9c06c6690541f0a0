"""What a backend is: the protocol, and checks of its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qeff_proxy.common.arguments import flag, one_of, whole_number
from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from qeff_proxy.artifact.export_folder import Export, ExportedPart
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.session.session import Session

__all__ = ["Backend", "check_options", "is_static", "precision_of"]


class Backend(Protocol):
    """What a backend does; made anew for each compilation.

    A backend may have attributes more:

    - ``static``: ``True``, or a method of the `CompileOptions` that says so: it compiles fixed
      shapes (see `qeff_proxy.backends.fixed_shapes`), so ``ctx_len`` and ``prefill_seq_len`` are
      always set when `compile` and `open` are called.
    - ``precision``: the dtype (or a method, likewise) that it computes in, whatever that of the
      tensors (``"float16"``, ``"a16w8"``); `qeff_proxy.verify` holds it to what that allows.
    - ``fingerprint(options)``: hashes of the files that its options name, by what they are. They
      go into the key of what was compiled. An option ``calibration`` takes a folder of dumps
      (`qeff_proxy.run.calibration`).
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
