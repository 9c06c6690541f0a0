"""What installed packages register: listed without importing any of it, loaded by name.

Every group of entry points is read here: families, flows, backends, demos and adapters for remote
code. `find_entries` lists a group, `find_entry` picks one name, `load_entry` imports it. A package
whose metadata is damaged is named, and hides no other.

A plugin package names its model types as entry points of the group ``qeff_proxy.families``: the
name is a model type (``model_type`` of a checkpoint's config), the value a module or object with
hooks::

    [project.entry-points."qeff_proxy.families"]
    mamba = "my_package.mamba"
    rwkv = "my_package.recurrent:rwkv"
    "mamba/encoder" = "my_package.mamba_encoder"

A name ``MODEL_TYPE/TASK`` claims the model type for one task alone (the name of a flow), where one
architecture serves several. ``*/TASK`` claims the model types that no package claims by name.

The environment variable ``QEFF_PROXY_PLUGINS`` chooses among packages. It is a list, separated by
commas, of

``PACKAGE``
    use only the packages named like this;
``-PACKAGE``
    do not use this package;
``MODEL_TYPE=PACKAGE``
    use this package for this model type, regardless of the other items.

``generic`` stands for the core's own fallback: ``generic`` alone switches every plugin off,
``MODEL_TYPE=generic`` those of one model type. Names of packages that are not installed are an
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import importlib_metadata

from qeff_proxy.common.version import CORE_PACKAGE, installed_version
from qeff_proxy.errors import PluginError, ProxyError, UsageError

ENTRY_POINT_GROUP = "qeff_proxy.families"
ENVIRONMENT_VARIABLE = "QEFF_PROXY_PLUGINS"
#: The name of the core's fallback plugin wherever a package can be named.
GENERIC = "generic"

_Made = TypeVar("_Made")
# Raised by reading the metadata of a damaged installation; it depends on the library's version.
_METADATA_FAULTS = (AttributeError, KeyError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class PackageEntry:
    """One entry point of an installed package.

    Attributes:
        name: What it registers: for a family the ``model_type`` of the checkpoints it serves, or
            ``MODEL_TYPE/TASK``.
        distribution: The package, as its metadata spells it.
        version: The package's version.
        value: The module, or ``module:object``.
    """

    name: str
    distribution: str
    version: str
    value: str

    def load(self) -> Any:
        """Import the object; raises whatever the package's code raises."""
        return importlib_metadata.EntryPoint(self.name, self.value, "").load()


@dataclass(frozen=True)
class BrokenPackage:
    """An installed package that has entries in the group, in metadata that cannot be read.

    Attributes:
        distribution: Its name; ``None`` where even that cannot be read.
        reason: What is wrong.
    """

    distribution: str | None
    reason: str


def find_entries(group: str) -> tuple[list[PackageEntry], list[BrokenPackage]]:
    """The entry points of ``group`` in all installed packages, without importing any.

    Returns:
        The entries, by package and name, and the packages with damaged metadata. A damaged
        package, ours or not, hides no other.
    """
    names: dict[str, None] = {}
    broken = []
    for distribution in importlib_metadata.distributions():
        try:
            if group in (distribution.read_text("entry_points.txt") or ""):
                names[_canonical(distribution.name)] = None
        except UnicodeDecodeError:
            continue  # nobody can tell which groups it has
        except _METADATA_FAULTS as error:
            where = distribution.locate_file("")
            broken.append(BrokenPackage(None, f"a package in {where} has no metadata: {error!r}"))
    entries: list[PackageEntry] = []
    for name in names:
        try:
            # By name: of two installations on the path, that is the one that imports see.
            package = importlib_metadata.distribution(name)
            entries += {
                PackageEntry(point.name, package.name, package.version, point.value)
                for point in package.entry_points.select(group=group)
            }
        except _METADATA_FAULTS as error:
            broken.append(BrokenPackage(name, f"its entry points cannot be read: {error!r}"))
    entries.sort(key=lambda entry: (_canonical(entry.distribution), entry.name, entry.value))
    return entries, broken


def pick_entry(
    entries: Iterable[PackageEntry], noun: str, name: str, hint: str = "Uninstall one of them."
) -> PackageEntry | None:
    """The entry called ``name``; ``None`` where there is none.

    Args:
        entries: What to choose from.
        noun: What an entry of the group is, for messages: ``"flow"``.
        name: Of the entry.
        hint: What to do about rivals.

    Raises:
        PluginError: Several packages have an entry of that name, or one package has two.
    """
    rivals = [entry for entry in entries if entry.name == name]
    if len(rivals) < 2:
        return next(iter(rivals), None)
    packages = sorted({entry.distribution for entry in rivals})
    if len(packages) == 1:
        raise PluginError(f"package {packages[0]} has two entries for the {noun} {name!r}", hint)
    raise PluginError(f"packages {' and '.join(packages)} both have a {noun} {name!r}", hint)


def find_entry(
    group: str, noun: str, name: str, builtin: Mapping[str, str] | None = None
) -> PackageEntry:
    """The entry of ``group`` called ``name``.

    Args:
        group: The group of entry points.
        noun: What an entry of the group is, for messages: ``"flow"``.
        name: Of the entry.
        builtin: The core's own entries, name → value; no package can replace them.

    Raises:
        PluginError: No package has such an entry, or several have.
    """
    builtin = builtin or {}
    if name in builtin:
        return PackageEntry(name, CORE_PACKAGE, installed_version(), builtin[name])
    entries, broken = find_entries(group)
    entry = pick_entry(entries, noun, name)
    if entry is None:
        known = sorted({*builtin, *(entry.name for entry in entries)})
        damaged = "".join(f" Package {one.distribution}: {one.reason}." for one in broken)
        raise PluginError(
            f"there is no {noun} {name!r}",
            f"Known are {', '.join(known)}; install the package it comes from.{damaged}",
        )
    return entry


def load_entry(entry: PackageEntry, noun: str, make: Callable[[Any], _Made]) -> _Made:
    """Import the object that an entry names, and make the result from it.

    Args:
        entry: What to import.
        noun: What an entry of the group is, for messages: ``"flow"``.
        make: Turns the imported object into the result, such as by calling it.

    Raises:
        ProxyError: Whatever the package raises on purpose.
        PluginError: Anything else it raises; names the package and the reason.
    """
    try:
        with named_if_interrupted(entry):
            return make(entry.load())
    except (ProxyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(
            f"{noun} {entry.name!r} of package {entry.distribution} cannot be used: {entry.value} "
            f"raised {type(error).__name__}: {error}",
            f"Repair the package, remove it, or choose another {noun}.",
        ) from error


@contextmanager
def named_if_interrupted(entry: PackageEntry) -> Iterator[None]:
    """Say, where Ctrl-C ends a package's code that hangs, whose code it was."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"while {entry.value} of package {entry.distribution} was imported")
        raise


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@dataclass(frozen=True)
class Selection:
    """The value of ``QEFF_PROXY_PLUGINS``. Package names are in their canonical spelling.

    Attributes:
        only: The packages to use; empty means all of them.
        disabled: The packages not to use.
        chosen: Model type to the package that serves it.
    """

    only: frozenset[str] = frozenset()
    disabled: frozenset[str] = frozenset()
    chosen: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, entries: Sequence[PackageEntry], broken: Iterable[str]) -> Selection:
        """Read the variable's value.

        Args:
            text: The value; empty selects every package.
            entries: The installed entries, to check names against.
            broken: Damaged packages, which may be named too.

        Raises:
            UsageError: A name is unknown, or the value contradicts itself.
        """
        known = {_canonical(entry.distribution) for entry in entries} | {GENERIC}
        known |= {_canonical(name) for name in broken}
        only: set[str] = set()
        disabled: set[str] = set()
        chosen: dict[str, str] = {}
        for word in filter(None, (piece.strip() for piece in text.split(","))):
            model_type, equals, package = word.rpartition("=")
            name = _canonical(package.strip().removeprefix("-"))
            if name not in known:
                raise _complaint(f"names {name!r}, which is not installed", known)
            if equals:
                _add_choice(chosen, model_type.strip(), name, entries)
            elif word.startswith("-"):
                disabled.add(name)
            else:
                only.add(name)
        contradicted = sorted(disabled & (only | set(chosen.values()) | {GENERIC}))
        if contradicted:
            what = "cannot be switched off" if GENERIC in contradicted else "is also asked for"
            raise _complaint(f"disables {contradicted[0]!r}, which {what}", known)
        return cls(frozenset(only), frozenset(disabled), tuple(sorted(chosen.items())))

    def admits(self, entry: PackageEntry) -> bool:
        """Whether this package may serve this model type."""
        package = _canonical(entry.distribution)
        chosen = dict(self.chosen).get(entry.name)
        if chosen is not None:
            return package == chosen
        return package not in self.disabled and (not self.only or package in self.only)


def _add_choice(
    chosen: dict[str, str], model_type: str, package: str, entries: Sequence[PackageEntry]
) -> None:
    if chosen.setdefault(model_type, package) != package:
        raise _complaint(f"chooses two packages for {model_type!r}", {chosen[model_type], package})
    claimants = {_canonical(e.distribution) for e in entries if e.name == model_type}
    if not claimants:
        types = {entry.name for entry in entries}
        raise _complaint(f"names model type {model_type!r}, which no package claims", types)
    if package not in claimants | {GENERIC}:
        problem = f"chooses {package!r} for {model_type!r}, which it does not claim"
        raise _complaint(problem, claimants | {GENERIC})


def _complaint(problem: str, names: Iterable[str]) -> UsageError:
    return UsageError(
        f"{ENVIRONMENT_VARIABLE} {problem}",
        f"Known here: {', '.join(sorted(names))}. It is a list, separated by commas, of PACKAGE, "
        "-PACKAGE or MODEL_TYPE=PACKAGE.",
    )
