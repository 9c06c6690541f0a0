"""Flows: how the parts of a proxy are run, and how a cut of that kind is verified.

The core ships ``causal-lm``. A package registers others as entry points of the group
``qeff_proxy.flows``: the name a `Proxy` carries → a class without constructor arguments.
"""

from __future__ import annotations

from qeff_proxy.flows.flow import CutReport, ExampleFlow, Flow, Job, TimedFlow, load_flow

__all__ = ["CutReport", "ExampleFlow", "Flow", "Job", "TimedFlow", "load_flow"]
