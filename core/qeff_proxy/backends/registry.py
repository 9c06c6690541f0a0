"""List the backends, say why any cannot be used, and load one by its name.

Two come with the core. The others are entry points of the group ``qeff_proxy.backends``; the
listing imports none of them, only what their packages register as `BackendListing`. A package that
cannot be read or imported is listed with the reason.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.listing import BackendListing
from qeff_proxy.common.version import CORE_PACKAGE
from qeff_proxy.errors import BackendError, PluginError, ProxyError, UsageError
from qeff_proxy.plugins.entry_points import PackageEntry, find_entries, find_entry, load_entry

#: ``listed``: installed, not imported. ``missing``: what it needs is not installed. ``rival``:
#: another package has a backend of that name.
BackendState = Literal["listed", "ok", "missing", "rival", "failed"]


ENTRY_POINT_GROUP = "qeff_proxy.backends"
_LISTING_GROUP = "qeff_proxy.backend_listings"
# Extras of this package that bring the backend of the same name.
_EXTRAS = ("openvino", "qaic", "qnn")

BUILTIN_BACKENDS = {
    "onnxruntime": "qeff_proxy.backends.onnxruntime.backend:OnnxRuntimeBackend",
    "torch": "qeff_proxy.backends.torch.backend:TorchBackend",
}
_BUILTIN_LISTINGS = {
    "onnxruntime": BackendListing("any CPU; the default", "onnxruntime", "pip install onnxruntime"),
    "torch": BackendListing("PyTorch, the reference", "torch", "pip install torch"),
}


@dataclass(frozen=True)
class BackendReport:
    """One line of ``qeff-proxy backends``.

    Attributes:
        name: What users type.
        summary: What it is for; empty where its package registers no `BackendListing`.
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


def list_backends() -> list[BackendReport]:
    """Describe each backend without importing it: the core's first, then those of packages."""
    builtin = [
        find_entry(ENTRY_POINT_GROUP, "backend", name, BUILTIN_BACKENDS)
        for name in sorted(BUILTIN_BACKENDS)
    ]
    entries, broken = find_entries(ENTRY_POINT_GROUP)
    listings, _ = find_entries(_LISTING_GROUP)
    reports = [_report(entry, entries, listings) for entry in [*builtin, *entries]]
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
        BackendError: The package that a backend comes from is not installed.
    """
    reports = list_backends()
    known = [report.name for report in reports if report.name]
    for name in names:
        if name not in known:
            _refuse_not_installed(name)
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


def _report(
    entry: PackageEntry, entries: Sequence[PackageEntry], listings: Sequence[PackageEntry]
) -> BackendReport:
    name = entry.name
    report = BackendReport(name, "", entry.distribution, entry.version, "listed")
    others = {e.distribution for e in entries if e.name == name and e is not entry}
    if entry.distribution != CORE_PACKAGE and name in BUILTIN_BACKENDS:
        return replace(report, state="rival", reason="the name is that of a backend of qeff-proxy")
    if entry.distribution != CORE_PACKAGE and others:
        return replace(report, state="rival", reason=f"{', '.join(sorted(others))} has it, too")
    try:
        return _described(report, _load_listing(entry, listings))
    except ProxyError as error:
        return replace(report, state="failed", reason=error.problem)


def _described(report: BackendReport, listing: BackendListing | None) -> BackendReport:
    """The report with what a listing says."""
    if listing is None:
        return report
    if listing.requires is not None:
        report = replace(report, package=listing.requires, version=listing.version())
    report = replace(report, summary=listing.summary)
    reason = listing.why_missing()
    if reason:
        return replace(
            report, version=None, state="missing", reason=reason, install=listing.install
        )
    return report


def _load_listing(entry: PackageEntry, listings: Sequence[PackageEntry]) -> BackendListing | None:
    """What the package of a backend registers for listing it; ``None`` where it does not.

    Raises:
        PluginError: It cannot be imported, or is no `BackendListing`.
    """
    if entry.distribution == CORE_PACKAGE:
        return _BUILTIN_LISTINGS.get(entry.name)
    for one in listings:
        if (one.name, one.distribution) == (entry.name, entry.distribution):
            return load_entry(one, "listing of the backend", _check_listing)
    return None


def _check_listing(target: Any) -> BackendListing:
    if not isinstance(target, BackendListing):
        raise TypeError(f"{target!r} is no {BackendListing.__module__}.BackendListing")
    return target


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


def load_backend(name: str) -> Backend:
    """Make the backend called ``name``.

    Raises:
        BackendError: There is none of that name, or what it needs is not installed.
    """
    if not isinstance(name, str):
        raise UsageError(f"backend is {name!r}", "Give the name of a backend.")
    try:
        entry = find_entry(ENTRY_POINT_GROUP, "backend", name, BUILTIN_BACKENDS)
    except PluginError as error:
        _refuse_not_installed(name)
        raise BackendError(error.problem, error.hint) from error
    try:
        return load_entry(entry, "backend", lambda target: check_class(target)())
    except PluginError as error:
        listing = _load_listing(entry, find_entries(_LISTING_GROUP)[0])
        if isinstance(error.__cause__, ImportError) and listing is not None:
            raise BackendError(
                f"backend {name!r} cannot be used: {error.__cause__}",
                f"Install it: {listing.install}.",
            ) from error
        raise BackendError(error.problem, error.hint) from error


def _refuse_not_installed(name: str) -> None:
    """Name the extra that brings a backend, if no installed package has it but an extra does.

    Raises:
        BackendError: So it is.
    """
    entries, _ = find_entries(ENTRY_POINT_GROUP)
    if name in _EXTRAS and name not in {entry.name for entry in entries}:
        raise BackendError(
            f"backend {name!r} is not installed", f"Install it: pip install 'qeff-proxy[{name}]'."
        )
