"""Demos: what ``qeff-proxy demo`` runs, contributed by the core and by installed packages.

A package names a demo as an entry point of the group ``qeff_proxy.demos``: the name users type → a
function without arguments that gives a `Demo`::

    [project.entry-points."qeff_proxy.demos"]
    mamba = "my_package.demo:mamba"

Nothing of it is imported until that demo runs. A demo brings its own checkpoint, so that it needs
no network, and a function that holds its run against the uncut model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import importlib_metadata

from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import PluginError, ProxyError, UsageError
from qeff_proxy.plugins.entry_points import ENVIRONMENT_VARIABLE, FamilyEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_proxy.demo.parity import Parity
    from qeff_proxy.dump import Dump
    from qeff_proxy.plugins.entry_points import Selection
    from qeff_proxy.request import Request
    from qeff_proxy.run.run_compiled import RunResult

__all__ = ["BUILTIN_DEMO", "ENTRY_POINT_GROUP", "Demo", "DemoEntry", "choose", "find_demos", "load"]

ENTRY_POINT_GROUP = "qeff_proxy.demos"
#: The demo of the core itself: a small language model.
BUILTIN_DEMO = "text"
_CORE_PACKAGE = "qeff-proxy"


@dataclass(frozen=True)
class Demo:
    """One run of the whole flow, on a checkpoint and an input that come with a package.

    Attributes:
        checkpoint: The checkpoint: a folder, or a hub id that a user gave.
        request: The input.
        given: The input in a few words, for people.
        settings: What the flow understands: ``max_new_tokens`` …
        parity: Runs the input that a dump holds through the uncut model, in PyTorch, and compares
            the logits.
        shown: What came out, for people: text, a transcript.
    """

    checkpoint: Path | str
    request: Request
    given: str
    parity: Callable[[PreTrainedModel, Dump], Parity]
    shown: Callable[[RunResult], str]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DemoEntry:
    """A demo that can be chosen.

    Attributes:
        name: What users type.
        distribution: The package it comes from.
        value: ``module:function``, as the package's metadata says.
    """

    name: str
    distribution: str
    value: str


def find_demos(selection: Selection) -> list[DemoEntry]:
    """The core's demo, then those of installed packages that take part, by name.

    Nothing is imported.
    """
    found = {
        DemoEntry(entry.name, entry.dist.name if entry.dist else entry.value, entry.value)
        for entry in importlib_metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    admitted = [
        entry
        for entry in found
        if selection.admits(FamilyEntry(entry.name, entry.distribution, "", entry.value))
    ]
    admitted.sort(key=lambda entry: (entry.name, entry.distribution))
    return [DemoEntry(BUILTIN_DEMO, _CORE_PACKAGE, ""), *admitted]


def choose(entries: Iterable[DemoEntry], names: Sequence[str]) -> list[DemoEntry]:
    """The demos called ``names``, in that order; all of them without names.

    Raises:
        UsageError: There is none of such a name.
        PluginError: Two packages bring one of the same name.
    """
    by_name: dict[str, list[DemoEntry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    if unknown := [name for name in names if name not in by_name]:
        raise UsageError(
            f"there is no demo {unknown[0]!r}",
            f"Known are {', '.join(by_name)}; install the package it comes from.",
        )
    chosen = [by_name[name] for name in dict.fromkeys(names or by_name)]
    if rivals := next((several for several in chosen if len(several) > 1), None):
        packages = [entry.distribution for entry in rivals]
        raise PluginError(
            f"packages {' and '.join(packages)} both bring a demo {rivals[0].name!r}",
            f"Choose with {ENVIRONMENT_VARIABLE}=-{packages[-1]}.",
        )
    return [entry for several in chosen for entry in several]


def load(entry: DemoEntry) -> Demo:
    """Make the demo of an installed package.

    Raises:
        PluginError: It cannot be imported, or gives no `Demo`.
    """
    point = importlib_metadata.EntryPoint(entry.name, entry.value, ENTRY_POINT_GROUP)
    try:
        demo = point.load()()
    except ProxyError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"demo {entry.name!r} ({entry.value}) of package {entry.distribution} cannot be used: "
            f"{type(error).__name__}: {error}",
            "Repair or remove the package, or name the demos to run.",
        ) from error
    if not isinstance(demo, Demo):
        raise PluginError(
            f"demo {entry.name!r} ({entry.value}) of package {entry.distribution} gives "
            f"{type_named(demo)}",
            "It is to be a function that gives a qeff_proxy.demo.Demo.",
        )
    return demo
