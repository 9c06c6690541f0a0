"""Which plugins are installed and which of them take part, told without importing any.

A plugin package names its model types as entry points of the group ``qeff_proxy.families``: the
name is a model type (``model_type`` of a checkpoint's config), the value a module or an object
that carries hooks::

    [project.entry-points."qeff_proxy.families"]
    mamba = "my_package.mamba"
    rwkv = "my_package.recurrent:rwkv"
    "mamba/encoder" = "my_package.mamba_encoder"

A name ``MODEL_TYPE/TASK`` claims the model type for one task alone (the name of a flow), where one
architecture serves several.

The environment variable ``QEFF_PROXY_PLUGINS`` chooses among packages. It is a list, separated by
commas, of

``PACKAGE``
    use the packages named so and no other;
``-PACKAGE``
    do not use this one;
``MODEL_TYPE=PACKAGE``
    for this model type use this package, whatever the rest says.

``generic`` stands for the core's own fallback: ``generic`` alone switches every plugin off,
``MODEL_TYPE=generic`` those of one model type. Names that nothing installed bears are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import importlib_metadata

from qeff_proxy.errors import UsageError

__all__ = [
    "ENTRY_POINT_GROUP",
    "ENVIRONMENT_VARIABLE",
    "GENERIC",
    "BrokenPackage",
    "FamilyEntry",
    "Selection",
    "find_entries",
    "find_families",
]

ENTRY_POINT_GROUP = "qeff_proxy.families"
ENVIRONMENT_VARIABLE = "QEFF_PROXY_PLUGINS"
#: What the core's fallback plugin is called wherever a package can be named.
GENERIC = "generic"

# What reading the metadata of a damaged installation raises, by the version of the library.
_METADATA_FAULTS = (AttributeError, KeyError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class FamilyEntry:
    """One model type that an installed package claims.

    Attributes:
        model_type: The ``model_type`` of the checkpoints it serves, or ``MODEL_TYPE/TASK``.
        distribution: The package, as its metadata spells it.
        version: The package's version.
        value: The module, or ``module:object``, that carries the hooks.
    """

    model_type: str
    distribution: str
    version: str
    value: str


@dataclass(frozen=True)
class BrokenPackage:
    """An installed package that claims families in metadata that cannot be read.

    Attributes:
        distribution: Its name; ``None`` where even that cannot be read.
        reason: What is wrong.
    """

    distribution: str | None
    reason: str


def find_families() -> tuple[list[FamilyEntry], list[BrokenPackage]]:
    """The families that installed packages claim (`find_entries`), by package and model type."""
    return find_entries(ENTRY_POINT_GROUP)


def find_entries(group: str) -> tuple[list[FamilyEntry], list[BrokenPackage]]:
    """Look through the installed packages, without importing them.

    Args:
        group: Of entry points; what is claimed by their names stands for the model type.

    Returns:
        The claims, by package and name, and the packages that claim some but are damaged.
        One damaged package, ours or not, hides no other.
    """
    names: dict[str, None] = {}
    broken = []
    for distribution in importlib_metadata.distributions():
        try:
            if group in (distribution.read_text("entry_points.txt") or ""):
                names[_canonical(distribution.name)] = None
        except UnicodeDecodeError:
            continue  # whose it is cannot be told
        except _METADATA_FAULTS as error:
            where = distribution.locate_file("")
            broken.append(BrokenPackage(None, f"a package in {where} has no metadata: {error!r}"))
    entries = []
    for name in names:
        try:
            entries += _entries_of(name, group)
        except _METADATA_FAULTS as error:
            broken.append(BrokenPackage(name, f"its entry points cannot be read: {error!r}"))
    entries.sort(key=lambda one: (_canonical(one.distribution), one.model_type, one.value))
    return entries, broken


def _entries_of(name: str, group: str) -> list[FamilyEntry]:
    # By name, because that is the installation the imports see when there are two on the path.
    distribution = importlib_metadata.distribution(name)
    entries = {
        FamilyEntry(entry.name, distribution.name, distribution.version, entry.value)
        for entry in distribution.entry_points.select(group=group)
    }
    return list(entries)


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@dataclass(frozen=True)
class Selection:
    """What ``QEFF_PROXY_PLUGINS`` says. Package names are in their canonical spelling.

    Attributes:
        only: The packages to use; empty means all of them.
        disabled: The packages not to use.
        chosen: Model type to the package that serves it.
    """

    only: frozenset[str] = frozenset()
    disabled: frozenset[str] = frozenset()
    chosen: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, entries: Sequence[FamilyEntry], broken: Iterable[str]) -> Selection:
        """Read the variable's value.

        Args:
            text: The value; empty chooses nothing.
            entries: What is installed, to check names against.
            broken: Packages that may be named too although they offer nothing.

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

    def admits(self, entry: FamilyEntry) -> bool:
        """Whether this package may serve this model type."""
        package = _canonical(entry.distribution)
        chosen = dict(self.chosen).get(entry.model_type)
        if chosen is not None:
            return package == chosen
        return package not in self.disabled and (not self.only or package in self.only)


def _add_choice(
    chosen: dict[str, str], model_type: str, package: str, entries: Sequence[FamilyEntry]
) -> None:
    if chosen.setdefault(model_type, package) != package:
        raise _complaint(f"chooses two packages for {model_type!r}", {chosen[model_type], package})
    claimants = {_canonical(e.distribution) for e in entries if e.model_type == model_type}
    if not claimants:
        types = {entry.model_type for entry in entries}
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
