"""Flows that break a rule each; the tests install them as a package."""

from __future__ import annotations

from dataclasses import replace

from qeff_proxy.flows.causal_lm import CausalFlow
from qeff_proxy.flows.flow import CutReport

__all__ = ["Careless", "Forgetful", "Headless", "Late", "Unsteady", "Unverified"]


class Unverified(CausalFlow):
    """Says that every cut is right."""

    def verify(self, model, proxy, sites):
        return CutReport(0.0, 1.0, 1e-5, "float32", 22)


class Forgetful(CausalFlow):
    """Tells the recorder nothing of the decode steps."""

    def run(self, job):
        return super().run(replace(job, recorder=_Filter(job.recorder, phase="prefill")))


class Headless(CausalFlow):
    """Tells the recorder nothing of the LM head."""

    def run(self, job):
        return super().run(replace(job, recorder=_Filter(job.recorder, without="lm_head")))


class Late(CausalFlow):
    """Pairs the outputs of a step with the inputs of the step before."""

    def run(self, job):
        return super().run(replace(job, recorder=_Delayed(job.recorder)))


class Careless(CausalFlow):
    """Decodes stubs."""

    def run(self, job):
        return super().run(replace(job, export=replace(job.export, kind="split")))


class Unsteady(CausalFlow):
    """Gives other numbers each time it runs."""

    runs = 0

    def run(self, job):
        Unsteady.runs += 1
        outputs = super().run(job)
        return {**outputs, "generated_ids": outputs["generated_ids"] + Unsteady.runs}


class _Filter:
    def __init__(self, recorder, phase=None, without=None):
        self.recorder = recorder
        self.phase = phase
        self.without = without

    def step(self, phase, index, part, inputs, outputs, **known):
        if self.phase in (None, phase) and part != self.without:
            self.recorder.step(phase, index, part, inputs, outputs, **known)


class _Delayed:
    def __init__(self, recorder):
        self.recorder = recorder
        self.before = {}

    def step(self, phase, index, part, inputs, outputs, **known):
        known_inputs = self.before.get(part, inputs)
        self.before[part] = inputs
        self.recorder.step(phase, index, part, known_inputs, outputs, **known)
