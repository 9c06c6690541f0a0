"""Isolate a fault: from the layer that is out of line to the operator that causes it."""

from qeff_proxy.isolate.between_dumps import isolate_dumps
from qeff_proxy.isolate.between_exports import isolate_between
from qeff_proxy.isolate.capsule import read_capsule
from qeff_proxy.isolate.isolate_fault import isolate_fault
from qeff_proxy.isolate.results import Cause, Fault, OperatorFacts, describe_fault
from qeff_proxy.isolate.run_capsule import run_capsule

__all__ = [
    "Cause",
    "Fault",
    "OperatorFacts",
    "describe_fault",
    "isolate_between",
    "isolate_dumps",
    "isolate_fault",
    "read_capsule",
    "run_capsule",
]
