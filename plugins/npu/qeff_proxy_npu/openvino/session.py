"""Sessions of OpenVINO: arrays in and out, one inference at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.errors import BackendError
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session

__all__ = ["OpenVinoSession"]


class OpenVinoSession(Session):
    """A part on one of OpenVINO's devices.

    Args:
        compiled: OpenVINO's compiled model.
        part: The part that it runs.
    """

    def __init__(self, compiled: Any, part: PartLike) -> None:
        super().__init__(part)
        self._request: Any = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs one inference at a time

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        """Run one inference."""
        with self._lock:
            self.check_open()  # it may have been closed while this run waited
            try:
                result = self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
            except (RuntimeError, ValueError, TypeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                reason = lines[-1] if lines else type(error).__name__
                raise BackendError(f"OpenVINO failed on the {self.name} part: {reason}") from error
        outputs: dict[str, Array] = {}
        arrays: set[int] = set()
        for spec in self.part.outputs:
            array = result[spec.name]
            if id(array) in arrays:  # one tensor under two names
                array = array.copy()
            arrays.add(id(array))
            dtype = numpy_dtype(spec.dtype)
            # OpenVINO returns the bits of a bfloat16 as those of a float16.
            outputs[spec.name] = array if array.dtype == dtype else array.view(dtype)
        return outputs

    def release(self) -> None:
        """Release the request, and the weights with it."""
        with self._lock:
            del self._request
