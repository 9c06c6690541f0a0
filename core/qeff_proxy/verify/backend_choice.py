"""Which backends there are to choose from on this machine, and why not the others."""

from __future__ import annotations

from collections.abc import Callable

from qeff_proxy.backends.registry import list_backends, load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ProxyError

__all__ = ["BEST", "backends_to_choose_from", "why_untimed"]

#: Stands for all backends that can be chosen here, where backends are named.
BEST = "best"
#: The reference is no contender; it has a row of its own.
_REFERENCE = "torch"


def backends_to_choose_from(
    options_of: Callable[[str], CompileOptions] = lambda _name: CompileOptions(),
) -> tuple[list[str], dict[str, str]]:
    """The backends that can run here as they would in earnest, and why each other is left out.

    Args:
        options_of: What a backend is to be compiled with.

    Returns:
        Names, and name → reason.
    """
    names: list[str] = []
    left_out: dict[str, str] = {}
    for report in list_backends():
        name = report.name
        if name == _REFERENCE or not name:
            continue
        reason = report.reason if report.state != "listed" else None
        if reason is None:
            try:
                reason = why_untimed(name, options_of(name))
            except ProxyError as error:
                reason = error.problem
        if reason is None:
            names.append(name)
        else:
            left_out[name] = reason
    return names, left_out


def why_untimed(name: str, options: CompileOptions) -> str | None:
    """Why a backend's seconds say nothing on this machine; ``None`` where they do.

    Raises:
        BackendError: It cannot be used at all.
    """
    return load_backend(name).untimed(options)
