"""The backends of this package, held to the suite that all packages' backends are held to."""

from __future__ import annotations

from qeff_proxy.testing.backends import BackendSuite


class TestOpenVino(BackendSuite):
    backend = "openvino"
    integer_bits = 32  # the CPU's plugin computes int64 as int32


class TestOpenVinoOfFixedShapes(BackendSuite):
    """What an NPU gets, on the CPU."""

    backend = "openvino"
    integer_bits = 32
    options = {"static_shapes": True, "save_compiled": True}  # noqa: RUF012 (as the suite has it)
