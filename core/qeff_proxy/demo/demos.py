"""The demos of ``qeff-proxy demo``, from the core and from installed packages.

A package names a demo as an entry point of the group ``qeff_proxy.demos``: the name users type → a
function without arguments that returns a `Demo`::

    [project.entry-points."qeff_proxy.demos"]
    mamba = "my_package.demo:mamba"

Nothing of it is imported until that demo runs. A demo brings its own checkpoint, so that it needs
no network; ``qeff-proxy demo`` verifies it on ONNX Runtime (`qeff_proxy.verify`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.common.messages import type_named
from qeff_proxy.common.version import CORE_PACKAGE, installed_version
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.entry_points import (
    ENVIRONMENT_VARIABLE,
    PackageEntry,
    Selection,
    find_entries,
    load_entry,
    pick_entry,
)
from qeff_proxy.request import Request

if TYPE_CHECKING:
    from qeff_proxy.run.run_compiled import RunResult

ENTRY_POINT_GROUP = "qeff_proxy.demos"
#: The demo of the core itself: a small language model.
BUILTIN_DEMO = "text"


@dataclass(frozen=True)
class Demo:
    """One run of the whole flow, on a checkpoint and an input that come with a package.

    Attributes:
        checkpoint: The checkpoint: a folder, or a hub id that a user gave.
        request: The input.
        given: The input in a few words, for people.
        shown: Turns the result of the run into text for people, such as a transcript.
        max_new_tokens: Tokens to generate, for models that generate.
    """

    checkpoint: Path | str
    request: Request
    given: str
    shown: Callable[[RunResult], str]
    max_new_tokens: int = 8


def find_demos(selection: Selection) -> list[PackageEntry]:
    """The core's demo (its value is empty), then those of installed packages that take part.

    Nothing is imported. A package with damaged metadata is warned of.
    """
    entries, broken = find_entries(ENTRY_POINT_GROUP)
    for package in broken:
        named = package.distribution or "unknown"
        warnings.warn(f"package {named} brings no demo: {package.reason}", stacklevel=2)
    admitted = [entry for entry in entries if selection.admits(entry)]
    admitted.sort(key=lambda entry: (entry.name, entry.distribution))
    return [PackageEntry(BUILTIN_DEMO, CORE_PACKAGE, installed_version(), ""), *admitted]


def choose(entries: Sequence[PackageEntry], names: Sequence[str]) -> list[PackageEntry]:
    """The demos called ``names``, in that order; all of them without names.

    Raises:
        UsageError: There is no demo of such a name.
        PluginError: Two packages bring a demo of the same name.
    """
    known = [entry.name for entry in entries]
    chosen = []
    for name in dict.fromkeys(names or known):
        entry = pick_entry(entries, "demo", name, f"Choose with {ENVIRONMENT_VARIABLE}=-PACKAGE.")
        if entry is None:
            raise UsageError(
                f"there is no demo {name!r}",
                f"Known are {', '.join(dict.fromkeys(known))}; install the package it comes from.",
            )
        chosen.append(entry)
    return chosen


def load(entry: PackageEntry) -> Demo:
    """Make the demo of an installed package.

    Raises:
        PluginError: It cannot be imported, or its function returns no `Demo`.
    """
    return load_entry(entry, "demo", _made_by)


def _made_by(function: Callable[[], object]) -> Demo:
    demo = function()
    if not isinstance(demo, Demo):
        raise TypeError(f"it returns {type_named(demo)}, not a qeff_proxy.demo.Demo")
    return demo
