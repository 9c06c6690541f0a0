"""The process that compiles for Qualcomm's HTP and runs its emulator, for `Worker`.

It is started as ``python -m qeff_proxy_npu.qnn.worker`` and imports little but ONNX Runtime and
NumPy. Requests come on standard input, answers go to what was standard output; whatever libraries
print goes to standard error, which is the log.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.session.messages import read_message, write_message

if TYPE_CHECKING:
    import onnxruntime
    from qeff_proxy.arrays import Array

__all__ = ["main"]

_VERBOSE, _ERROR = 0, 3
#: It would quantize the weights that a recipe keeps in half precision, to one scale for all.
_QUANTIZES = "WeightBiasQuantization"


class _Worker:
    """Answers requests, one after another."""

    def __init__(self, library: Mapping[str, str]) -> None:
        import onnxruntime

        self._runtime = onnxruntime
        self._library = library
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        onnxruntime.register_execution_provider_library(library["name"], library["path"])

    def _options(self, header: Mapping[str, Any]) -> onnxruntime.SessionOptions:
        options = self._runtime.SessionOptions()
        options.log_severity_level = _VERBOSE if header.get("verbose") else _ERROR
        devices = [
            one for one in self._runtime.get_ep_devices() if one.ep_name == self._library["name"]
        ]
        options.add_provider_for_devices(devices, dict(header["provider"]))
        for name, value in header.get("settings", {}).items():
            options.add_session_config_entry(name, value)
        return options

    def compile(self, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Write a context binary, and the model that wraps it."""
        options = self._options(header)
        self._runtime.InferenceSession(
            arrays["graph"].tobytes(), options, disabled_optimizers=[_QUANTIZES]
        )
        return {}

    def open(self, header: Mapping[str, Any], _: Mapping[str, Array]) -> dict[str, Any]:
        """Open a context binary."""
        path = Path(header["context"])
        self._sessions[header["key"]] = self._runtime.InferenceSession(
            str(path), self._options(header)
        )
        return {}

    def run(
        self, header: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Run what was opened."""
        session = self._sessions[header["key"]]
        outputs = session.run(header["outputs"], dict(arrays))
        return {}, dict(zip(header["outputs"], outputs, strict=True))

    def close(self, header: Mapping[str, Any], _: Mapping[str, Array]) -> dict[str, Any]:
        """Close what was opened."""
        del self._sessions[header["key"]]
        return {}

    def answer(
        self, header: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Serve a request; an error becomes the answer."""
        try:
            result = getattr(self, header["do"])(header, arrays)
        except Exception as error:  # noqa: BLE001 (the runtime's exceptions share no base class)
            return {"error": f"{error}".strip() or type(error).__name__}, {}
        return result if isinstance(result, tuple) else (result, {})


def _limit_memory(megabytes: int) -> None:
    import resource

    limit = megabytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Answer requests until there are no more."""
    # Ctrl-C is for the process that asks: it ends this one, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    try:
        header, _ = read_message(requests)
        if header.get("memory_mb"):
            _limit_memory(int(header["memory_mb"]))
        worker = _Worker(header["library"])
        write_message(answers, {})
        while True:
            write_message(answers, *worker.answer(*read_message(requests)))
    except EOFError:
        # Libraries that crash while they are unloaded must not look like a crash of the work.
        os._exit(0)


if __name__ == "__main__":
    main()
