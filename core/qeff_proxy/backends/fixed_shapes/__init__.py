"""Fixed shapes for backends that need them, from the dynamic export, without tracing again.

A backend of fixed shapes

1. sets ``static = True``, so that `qeff_proxy.backends.compile_export` fills in ``ctx_len`` and
   ``prefill_seq_len``;
2. in ``compile`` goes through ``Plan.of(part, options).specializations()``, makes each graph with
   `specialize`, and writes what its compiler makes of it;
3. in ``open`` gives a `StaticSession`, whose ``open_specialization`` opens one of these.

`runs_on_host` tells the parts that hold the vocabulary, which need no compiler.
"""

from __future__ import annotations

from qeff_proxy.backends.fixed_shapes.plan import Plan, name_of, runs_on_host, with_fixed_shapes
from qeff_proxy.backends.fixed_shapes.session import StaticSession
from qeff_proxy.backends.fixed_shapes.specialize import specialize
from qeff_proxy.session.axes import Sizes, axes_of

__all__ = [
    "Plan",
    "Sizes",
    "StaticSession",
    "axes_of",
    "name_of",
    "runs_on_host",
    "specialize",
    "with_fixed_shapes",
]
