"""Flows: run the parts of a proxy, and verify that a cut equals the uncut model.

The core ships ``causal-lm``. A package registers others as entry points of the group
``qeff_proxy.flows``: the name a `Proxy` carries → a class without constructor arguments.
"""

from __future__ import annotations

from qeff_proxy.flows.flow import CutReport, ExampleFlow, Flow, Job, TimedFlow, load_flow

__all__ = ["CutReport", "ExampleFlow", "Flow", "Job", "TimedFlow", "load_flow"]
