"""Which backends there are, and what keeps any from being used: told without importing them.

Those of this package are known by name. Others are entry points of the group
``qeff_proxy.backends``; one that cannot be read or imported stands in the list with its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import importlib_metadata

from qeff_proxy.backends.backend import Backend
from qeff_proxy.errors import BackendError, PluginError, UsageError
from qeff_proxy.plugins.entry_points import PackageEntry, find_entries, find_entry, load_entry

#: ``listed``: installed, not imported. ``missing``: what it needs is not installed. ``rival``:
#: another package has a backend of that name.
BackendState = Literal["listed", "ok", "missing", "rival", "failed"]


@dataclass(frozen=True)
class _Builtin:
    """What is known of a backend of ours: what it is for, the package it needs, how to get it."""

    summary: str
    package: str | None
    install: str


_BUILTIN = {
    "onnxruntime": _Builtin("any CPU; the default", "onnxruntime", "pip install onnxruntime"),
    "openvino": _Builtin(
        "Intel CPUs, GPUs and NPUs", "openvino", "pip install 'qeff-proxy[openvino]'"
    ),
    "qaic": _Builtin(
        "Qualcomm Cloud AI 100, compiled by the vendor's qaic-compile",
        None,
        "install Qualcomm's Cloud AI Apps SDK (qaic-compile in /opt/qti-aic/exec or on PATH)",
    ),
    "qnn": _Builtin(
        "Qualcomm HTP: compiler, and emulator on any CPU",
        "onnxruntime-qnn",
        "pip install 'qeff-proxy[qnn]'",
    ),
    "torch": _Builtin("PyTorch, the reference", "torch", "pip install torch"),
}


@dataclass(frozen=True)
class BackendReport:
    """One line of ``qeff-proxy backends``.

    Attributes:
        name: What users type.
        summary: What it is for; empty for other packages' backends.
        package: The package it needs, or that it comes from; ``None`` where it needs none.
        version: That package's version, where it is installed.
        state: Whether it can be used.
        reason: Why not; empty when all is well.
        install: How to install what is missing; empty where nothing is.
        versions: Of compiler and runtime; empty while it was not imported.
        devices: What it finds here; empty while it was not imported, or where it does not say.
        options: Its options and what they mean; ``None`` while it was not imported.
    """

    name: str
    summary: str
    package: str | None
    version: str | None
    state: BackendState
    reason: str = ""
    install: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None


def install_hint(name: str) -> str:
    """How to get what a backend of ours needs, as a sentence."""
    known = _BUILTIN.get(name)
    if known is None:
        return ""
    return (
        f"{known.install[0].upper()}{known.install[1:]}."
        if known.package is None
        else (f"Install it: {known.install}.")
    )


def list_backends() -> list[BackendReport]:
    """What is known of each backend, importing none: ours first, then those of other packages."""
    reports = [_builtin_report(name) for name in sorted(BUILTIN_BACKENDS)]
    entries, broken = find_entries(ENTRY_POINT_GROUP)
    reports += [_registered_report(entry, entries) for entry in entries]
    reports += [
        BackendReport("", "", package.distribution, None, "failed", package.reason)
        for package in broken
    ]
    return reports


def check_backends(names: Sequence[str] = ()) -> list[BackendReport]:
    """Import backends, and report versions, devices and options; one that fails harms no other.

    Args:
        names: Which; by default all.

    Raises:
        UsageError: There is none of a name.
    """
    reports = list_backends()
    known = [report.name for report in reports if report.name]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no backend {name!r}", f"Known are {', '.join(known)}.")
    wanted = [report for report in reports if not names or report.name in names]
    return [_checked(one) if one.state == "listed" else one for one in wanted]


def check_class(target: Any) -> type[Backend]:
    """Make sure that what a package registers is a class of backends.

    Raises:
        TypeError: It does not derive from `Backend`.
    """
    if not (isinstance(target, type) and issubclass(target, Backend)):
        raise TypeError(f"{target!r} does not derive from {Backend.__module__}.Backend")
    return target


def _builtin_report(name: str) -> BackendReport:
    known = _BUILTIN.get(name, _Builtin("", None, ""))
    version = None
    if known.package is not None:
        try:
            version = importlib_metadata.version(known.package)
        except importlib_metadata.PackageNotFoundError:
            reason = f"the package {known.package} is not installed"
            return BackendReport(
                name, known.summary, known.package, None, "missing", reason, known.install
            )
    if name == "qaic":
        from qeff_proxy.backends.qaic.sdk import find_compiler

        try:
            find_compiler()
        except BackendError as error:
            return BackendReport(
                name, known.summary, None, None, "missing", error.problem, known.install
            )
    return BackendReport(name, known.summary, known.package, version, "listed")


def _registered_report(entry: PackageEntry, entries: Sequence[PackageEntry]) -> BackendReport:
    name = entry.name
    report = BackendReport(name, "", entry.distribution, entry.version, "listed")
    if name in BUILTIN_BACKENDS:
        return replace(report, state="rival", reason="the name is that of a backend of qeff-proxy")
    others = {e.distribution for e in entries if e.name == name and e is not entry}
    if others:
        return replace(report, state="rival", reason=f"{', '.join(sorted(others))} has it, too")
    return report


def _checked(report: BackendReport) -> BackendReport:
    # What a package prints while it is imported must not spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            backend = load_backend(report.name)
            return replace(
                report,
                state="ok",
                versions=dict(backend.versions()),
                devices=tuple(backend.devices()),
                options=dict(backend.options),
            )
        except BackendError as error:
            return replace(report, state="failed", reason=error.problem)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (its code may raise anything)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return replace(report, state="failed", reason=reason)


ENTRY_POINT_GROUP = "qeff_proxy.backends"


BUILTIN_BACKENDS = {
    "onnxruntime": "qeff_proxy.backends.onnxruntime.backend:OnnxRuntimeBackend",
    "openvino": "qeff_proxy.backends.openvino.backend:OpenVinoBackend",
    "qaic": "qeff_proxy.backends.qaic.backend:QaicBackend",
    "qnn": "qeff_proxy.backends.qnn.backend:QnnBackend",
    "torch": "qeff_proxy.backends.torch.backend:TorchBackend",
}


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
        raise BackendError(
            f"backend {name!r} cannot be used: {error}", install_hint(name)
        ) from error


def _registered_backend(name: str) -> Backend:
    try:
        entry = find_entry(ENTRY_POINT_GROUP, "backend", name, BUILTIN_BACKENDS)
        return load_entry(entry, "backend", lambda found: check_class(found)())
    except PluginError as error:
        raise BackendError(error.problem, error.hint) from error
