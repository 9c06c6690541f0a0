"""What ``qeff-proxy backends`` shows of this package's backends; imports none of them."""

from __future__ import annotations

from qeff_proxy.backends.listing import BackendListing
from qeff_proxy.errors import BackendError

from qeff_proxy_npu.qaic.sdk import find_compiler

__all__ = ["OPENVINO", "QAIC", "QNN"]


class _QaicListing(BackendListing):
    """A backend that needs the vendor's compiler, which no package index has."""

    def why_missing(self) -> str:
        """Say where the compiler was looked for."""
        try:
            find_compiler()
        except BackendError as error:
            return error.problem
        return ""


OPENVINO = BackendListing(
    "Intel CPUs, GPUs and NPUs", "openvino", "pip install 'qeff-proxy[openvino]'"
)
QAIC = _QaicListing(
    "Qualcomm Cloud AI 100, compiled by the vendor's qaic-compile",
    install="install Qualcomm's Cloud AI Apps SDK",
)
QNN = BackendListing(
    "Qualcomm HTP: compiler, and emulator on any CPU",
    "onnxruntime-qnn",
    "pip install 'qeff-proxy[qnn]'",
)
