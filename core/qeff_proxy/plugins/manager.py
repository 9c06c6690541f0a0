"""The plugin manager: who answers the hooks for a model type.

1. `Plugins.discover` lists the installed packages (`qeff_proxy.plugins.entry_points`) and imports
   none of their plugins.
2. `Plugins.owner` imports the one plugin that claims a model type, and checks its hooks.
3. `Plugins.hooks_for` joins that owner with the core's generic plugin (`qeff_proxy.plugins.hooks`).

A model type has one owner. A plugin registered from Python comes before the installed ones;
``QEFF_PROXY_PLUGINS`` chooses among those (its syntax: `qeff_proxy.plugins.entry_points`). A plugin
that cannot be used is an error only for those who ask for a model type of its own.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from qeff_proxy.common.version import installed_version
from qeff_proxy.errors import PluginError
from qeff_proxy.plugins.entry_points import (
    ENTRY_POINT_GROUP,
    ENVIRONMENT_VARIABLE,
    GENERIC,
    BrokenPackage,
    PackageEntry,
    Selection,
    find_entries,
    named_if_interrupted,
)
from qeff_proxy.plugins.hooks import Hooks, InvalidPluginError, hook_names

_CORE_PACKAGE = "qeff-proxy"
_CLAIM = re.compile(r"([^*/]+|\*(?=/))(/[^*/]+)?")
_GENERIC_MODULE = "qeff_proxy.families.generic"

#: ``listed``: not imported yet. ``rival``: another package claims one of its model types too.
PluginState = Literal["listed", "ok", "disabled", "rival", "failed"]


@dataclass(frozen=True)
class LoadedPlugin:
    """An imported plugin whose hooks were checked.

    Attributes:
        name: The entry point's value, or the name it was registered under.
        plugin: The module or object that carries the hooks.
        hooks: The hooks it has, sorted.
        distribution: The package it came from; ``None`` when registered from Python.
        version: That package's version; ``None`` likewise.
    """

    name: str
    plugin: object
    hooks: tuple[str, ...]
    distribution: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class PluginOrigin:
    """Where a plugin comes from; the same attributes as `qeff_proxy.plugins.hooks.Hooks`.

    Attributes:
        plugin: Its name.
        distribution: The package; ``None`` when registered from Python.
        version: The package's version; ``None`` likewise.
    """

    plugin: str
    distribution: str | None
    version: str | None


@dataclass(frozen=True)
class PluginReport:
    """One line of ``qeff-proxy plugins``.

    Attributes:
        distribution: The package; ``None`` when registered from Python.
        version: The package's version; ``None`` likewise, or when it cannot be read.
        plugin: The module or ``module:object``.
        model_types: What it claims, sorted.
        hooks: What it implements; ``None`` while it was not imported.
        state: Whether it can be used.
        reason: Why not, or what to know; empty when all is well.
    """

    distribution: str | None
    version: str | None
    plugin: str
    model_types: tuple[str, ...]
    hooks: tuple[str, ...] | None
    state: PluginState
    reason: str = ""


@dataclass
class Plugins:
    """The plugins one program knows. Make one with `discover`.

    Attributes:
        entries: The model types that installed packages claim, disabled packages included.
        selection: Which of them take part.
        broken: Packages whose metadata cannot be read.
    """

    entries: Sequence[PackageEntry] = ()
    selection: Selection = field(default_factory=Selection)
    broken: Sequence[BrokenPackage] = ()
    _registered: dict[str, LoadedPlugin] = field(default_factory=dict, init=False, repr=False)
    # (package, value) -> the plugin, or why it cannot be used.
    _loaded: dict[tuple[str, str], LoadedPlugin | str] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def discover(cls, environ: Mapping[str, str] = os.environ) -> Plugins:
        """List the installed plugins, without importing any.

        Args:
            environ: Where ``QEFF_PROXY_PLUGINS`` is looked up.

        Raises:
            UsageError: ``QEFF_PROXY_PLUGINS`` names something unknown, or contradicts itself.
        """
        entries, broken = find_entries(ENTRY_POINT_GROUP)
        text = environ.get(ENVIRONMENT_VARIABLE, "")
        names = [package.distribution for package in broken if package.distribution]
        return cls(entries, Selection.parse(text, entries, names), broken)

    def families(self) -> list[PackageEntry]:
        """The model types of the packages that take part, by package and model type."""
        return [entry for entry in self.entries if self.selection.admits(entry)]

    def register(
        self, plugin: object, model_types: Iterable[str], name: str | None = None
    ) -> LoadedPlugin:
        """Make ``plugin`` the owner of ``model_types``, ahead of the installed packages.

        Args:
            plugin: A module or object whose functions carry ``@hookimpl``.
            model_types: What it serves.
            name: Its name in messages; by default its ``__name__`` or class name.

        Raises:
            PluginError: Its hooks are wrong, or another plugin was registered for one of these.
        """
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        try:
            loaded = LoadedPlugin(name, plugin, hook_names(plugin))
        except InvalidPluginError as error:
            raise PluginError(f"plugin {name!r} cannot be used: {error}") from error
        types = sorted({model_types} if isinstance(model_types, str) else set(model_types))
        for model_type in types:
            if (other := self._registered.get(model_type)) is not None:
                raise PluginError(
                    f"plugin {name!r} and plugin {other.name!r} are both registered for model type "
                    f"{model_type!r}",
                    "Register one of them.",
                )
        self._registered |= dict.fromkeys(types, loaded)
        return loaded

    def owner(self, model_type: str) -> LoadedPlugin | None:
        """The plugin that serves ``model_type``, imported on first use; ``None`` where none does.

        Raises:
            PluginError: Two packages claim it, or the plugin cannot be used.
        """
        claim = self._claim(model_type)
        if not isinstance(claim, PackageEntry):
            return claim
        loaded = self._load(claim)
        if isinstance(loaded, str):
            raise PluginError(
                f"plugin {claim.value!r} of package {claim.distribution!r}, which serves "
                f"{model_type!r}, cannot be used: {loaded}",
                f"Repair or remove the package, or pass over it with "
                f"{ENVIRONMENT_VARIABLE}={model_type}={GENERIC}.",
            )
        return loaded

    def origin(self, model_type: str) -> PluginOrigin:
        """Where the hooks of ``model_type`` come from (`hooks_for`), without importing a plugin.

        Raises:
            PluginError: Two packages claim it.
        """
        claim = self._claim(model_type)
        if claim is None:
            return PluginOrigin(GENERIC, _CORE_PACKAGE, installed_version())
        name = claim.value if isinstance(claim, PackageEntry) else claim.name
        return PluginOrigin(name, claim.distribution, claim.version)

    def _claim(self, model_type: str) -> LoadedPlugin | PackageEntry | None:
        """The registered plugin or the one installed package that serves ``model_type``."""
        if (registered := self._registered.get(model_type)) is not None:
            return registered
        if (rivals := self._rivals(model_type)) is not None:
            raise rivals
        return next((entry for entry in self.families() if entry.name == model_type), None)

    def import_for(self, model_type: str) -> None:
        """Import the plugins of ``model_type``, for all tasks.

        A package may bring an architecture that transformers does not know: it registers it with
        transformers' auto classes when it is imported.

        Raises:
            PluginError: Two packages claim it, or a plugin cannot be used.
        """
        claims = {entry.name for entry in self.families()}
        for claim in sorted(claims):
            if claim.partition("/")[0] == model_type:
                self.owner(claim)

    def hooks_for(
        self, model_type: str, *, task: str | None = None, generic: object | None = None
    ) -> Hooks:
        """The five hooks for ``model_type``: its owner's, with the generic plugin as the fallback.

        Args:
            model_type: The ``model_type`` of the config.
            task: The name of the flow. A package that claims ``MODEL_TYPE/TASK`` serves the model
                type for that task alone, and takes precedence for it; one that claims ``*/TASK``
                serves all model types that no package claims.
            generic: Replaces the core's generic plugin; its hooks are ``trylast``.

        Raises:
            PluginError: Two packages claim the model type, or its plugin cannot be used.
        """
        names = [model_type] if task is None else [f"{model_type}/{task}", model_type, f"*/{task}"]
        owner = next(filter(None, map(self.owner, names)), None)
        if generic is None:
            generic = importlib.import_module(_GENERIC_MODULE)
        if owner is None:
            return Hooks(
                model_type, generic, distribution=_CORE_PACKAGE, version=installed_version()
            )
        return Hooks(
            model_type,
            generic,
            owner=owner.plugin,
            plugin=owner.name,
            distribution=owner.distribution,
            version=owner.version,
        )

    def check(self) -> list[PluginReport]:
        """Import every selected plugin, and report; a failing plugin affects no other."""
        for entry in self.families():
            self._load(entry)
        return self.reports()

    def check_generic(self) -> PluginReport:
        """Import the core's generic plugin, and report."""
        self._load(_generic_entry())
        return self.generic_report()

    def generic_report(self) -> PluginReport:
        """The state of the core's generic plugin, without importing it."""
        return replace(self._describe([_generic_entry()]), plugin=GENERIC, model_types=())

    def reports(self) -> list[PluginReport]:
        """The state of each plugin, without importing any."""
        grouped: dict[tuple[str, str], list[PackageEntry]] = {}
        for entry in self.entries:
            grouped.setdefault((entry.distribution, entry.value), []).append(entry)
        reports = [self._report(group) for group in grouped.values()]
        reports += [
            PluginReport(package.distribution, None, "", (), None, "failed", package.reason)
            for package in self.broken
        ]
        registered = {id(loaded): loaded for loaded in self._registered.values()}
        for loaded in registered.values():
            served = sorted(name for name, plugin in self._registered.items() if plugin is loaded)
            reports.append(PluginReport(None, None, loaded.name, tuple(served), loaded.hooks, "ok"))
        return reports

    def _report(self, group: Sequence[PackageEntry]) -> PluginReport:
        report = self._describe(group)
        notes = [report.reason] if report.reason else []
        notes += self._notes(group)
        state = report.state
        active = [entry for entry in group if self.selection.admits(entry)]
        if not active:
            state = "disabled"
        elif not all(_CLAIM.fullmatch(entry.name) for entry in active):
            state = "failed"
        elif state != "failed" and any(self._rivals(entry.name) for entry in active):
            state = "rival"
        return replace(report, state=state, reason="; ".join(notes))

    def _describe(self, group: Sequence[PackageEntry]) -> PluginReport:
        """The state of one plugin: not imported yet, imported or failed."""
        entry = group[0]
        loaded = self._loaded.get((entry.distribution, entry.value))
        model_types = tuple(sorted({one.name for one in group}))
        report = PluginReport(
            entry.distribution, entry.version, entry.value, model_types, None, "listed"
        )
        if isinstance(loaded, str):
            return replace(report, state="failed", reason=loaded)
        return report if loaded is None else replace(report, state="ok", hooks=loaded.hooks)

    def _load(self, entry: PackageEntry) -> LoadedPlugin | str:
        key = (entry.distribution, entry.value)
        if key not in self._loaded:
            self._loaded[key] = _import_plugin(entry)
        return self._loaded[key]

    def _rivals(self, model_type: str) -> PluginError | None:
        """The error to raise where several plugins claim ``model_type``; else ``None``."""
        claims = [entry for entry in self.families() if entry.name == model_type]
        if len(claims) < 2 or model_type in self._registered:
            return None
        packages = sorted({claim.distribution for claim in claims})
        if len(packages) == 1:
            values = " and ".join(sorted(repr(claim.value) for claim in claims))
            return PluginError(
                f"package {packages[0]!r} claims model type {model_type!r} twice: {values}",
                f"Pass over it with {ENVIRONMENT_VARIABLE}={model_type}={GENERIC}.",
            )
        named = " and ".join(f"{claim.distribution!r} {claim.version}" for claim in claims)
        choices = [f"{ENVIRONMENT_VARIABLE}={model_type}={package}" for package in packages]
        return PluginError(
            f"packages {named} both claim model type {model_type!r}",
            f"Choose with {' or '.join(choices)}.",
        )

    def _notes(self, group: Sequence[PackageEntry]) -> list[str]:
        """Why one plugin does not serve its model types, a line for each."""
        if not any(self.selection.admits(entry) for entry in group):
            return [f"not selected by {ENVIRONMENT_VARIABLE}"]
        notes = []
        for entry in group:
            if not self.selection.admits(entry):
                notes.append(f"{entry.name}: not selected by {ENVIRONMENT_VARIABLE}")
            elif not _CLAIM.fullmatch(entry.name):
                notes.append(
                    f"{entry.name} claims nothing: it is not MODEL_TYPE, MODEL_TYPE/TASK or */TASK"
                )
            elif (registered := self._registered.get(entry.name)) is not None:
                notes.append(
                    f"{entry.name}: served by {registered.name!r}, which was registered from Python"
                )
            elif (rivals := self._rivals(entry.name)) is not None:
                notes.append(str(rivals))
        return notes


def _generic_entry() -> PackageEntry:
    return PackageEntry(GENERIC, _CORE_PACKAGE, installed_version(), _GENERIC_MODULE)


def _import_plugin(entry: PackageEntry) -> LoadedPlugin | str:
    """The plugin that ``entry`` names, or the reason it cannot be used."""
    try:
        with named_if_interrupted(entry):
            plugin = entry.load()
            hooks = hook_names(plugin)
    except InvalidPluginError as error:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (a plugin's code may raise anything)
        return " ".join(f"{type(error).__name__}: {error}".split())
    return LoadedPlugin(entry.value, plugin, hooks, entry.distribution, entry.version)
