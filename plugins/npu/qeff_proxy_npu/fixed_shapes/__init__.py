"""Fixed shapes for backends that need them, from the dynamic export, without tracing again.

A backend of fixed shapes derives from `FixedShapesBackend` (in the module ``backend``), which
leaves the parts with the vocabulary to ONNX Runtime. For each other part,

1. ``compile_part`` goes through ``Plan.of(part, options).specializations()``, makes each graph with
   `qeff_proxy_npu.fixed_shapes.specialize.specialize`, and compiles it;
2. ``open_part`` returns a `StaticSession`, which opens these as runs need them.
"""

from __future__ import annotations

from qeff_proxy.session.axes import Sizes

from qeff_proxy_npu.fixed_shapes.plan import Plan, name_of, runs_on_host
from qeff_proxy_npu.fixed_shapes.session import StaticSession

__all__ = ["Plan", "Sizes", "StaticSession", "name_of", "runs_on_host"]
