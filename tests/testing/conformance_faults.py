"""What is wrong with a plugin that a check must see, and how it is brought before the check."""

from __future__ import annotations

import dataclasses
import re
import shutil
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from qeff_proxy.errors import ProxyError
from qeff_proxy.families import generic
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.testing import FamilySuite
from qeff_proxy.testing.subject import Subject

__all__ = ["Fault", "checks_of", "cut_like", "expect_seen", "run_check", "subject_of"]


@dataclass(frozen=True)
class Fault:
    """What is wrong.

    Attributes:
        check: The check that must see it.
        says: What the failure must say, as a regular expression.
        hooks: Hooks in place of the sound plugin's.
        suite: Attributes and methods in place of the sound suite's.
        flow: A flow of `faulty_flows`, by name.
        session: Makes faulty sessions of sound ones.
        export: Changes a copy of the sound export.
        runs: Whether the check runs the parts, so that the sound export serves.
    """

    check: str
    says: str
    hooks: dict[str, Any] = dataclasses.field(default_factory=dict)
    suite: dict[str, Any] = dataclasses.field(default_factory=dict)
    flow: str | None = None
    session: Callable[[Any, str], Any] | None = None
    export: Callable[[Any], Any] | None = None
    runs: bool = False


def checks_of(kinds: Iterable[type]) -> set[str]:
    """The checks that classes have."""
    names = {name for kind in kinds for name in dir(kind) if name.startswith("test_")}
    return {name.removeprefix("test_") for name in names}


def cut_like(change):
    """A ``build_proxy`` that changes what the sound one gives."""

    def build_proxy(model, embedding, lm_head, kind, options):
        proxy = generic.build_proxy(model, embedding, lm_head, kind)
        return change(proxy, model=model, kind=kind, options=options) or proxy

    return {"build_proxy": build_proxy}


def plugin_of(hooks):
    """A plugin with these hooks; where it has none, the generic one answers."""

    class Plugin:
        pass

    for name, function in (hooks or {"locate_embedding": lambda: None}).items():
        setattr(Plugin, name, staticmethod(hookimpl(function)))
    return Plugin()


def subject_of(fault, sound, folder, suites):
    """A subject with the fault, and with the sound family's parts where those serve."""
    changes = {"plugin": plugin_of(fault.hooks), **fault.suite}
    suite = type("FaultySuite", (suites,), changes)
    subject = Subject(suite(), folder)
    runs = fault.runs or "make_inputs" in fault.suite
    if not fault.hooks.get("build_proxy") and (runs or fault.export or fault.session):
        borrowed = {"model": sound.model, "loaded": sound.loaded, "cut": sound.cut}
        borrowed["checkpoint"] = sound.checkpoint
        subject.__dict__.update(borrowed, export=sound.export, sessions=sound.sessions)
    elif fault.runs or fault.check.startswith("a_stub_reads"):
        subject.__dict__.update(export=sound.export, sessions=sound.sessions)
    if fault.export is not None:
        copy = shutil.copytree(sound.export.folder, folder / "copy")
        subject.__dict__["export"] = fault.export(replace(sound.export, folder=copy))
    if fault.suite.get("silent"):  # nothing behind the plugin that would decode for it
        silent = types.SimpleNamespace(preprocess=generic.preprocess)
        subject.__dict__["hooks"] = subject.plugins.hooks_for("gpt2", generic=silent)
    if fault.flow is not None:
        subject.__dict__["export"] = replace(sound.export, flow=fault.flow)
    if fault.session is not None:
        subject.__dict__["sessions"] = {
            name: fault.session(one, name) for name, one in sound.sessions.items()
        }
    return subject


def run_check(name, subject, folder):
    check = getattr(FamilySuite, f"test_{name}")
    extra = {"tmp_path": folder} if "tmp_path" in check.__code__.co_varnames else {}
    check(subject.suite, subject, **extra)


def expect_seen(fault, sound, folder):
    """A check fails on its fault, and says what it is to say."""
    subject = subject_of(fault, sound, folder / "faulty", type(sound.suite))
    (folder / "dump").mkdir()
    with pytest.raises((pytest.fail.Exception, ProxyError)) as caught:
        run_check(fault.check, subject, folder / "dump")
    said = " ".join(str(caught.value).split())
    assert re.search(fault.says, said), said
